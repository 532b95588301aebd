#include "library.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "team.h"

namespace scarlet {

Codebooks codebooks;

namespace {

struct Choice {
  const char* name;
  bool runs_here;
  const Kernels& (*get)();
};

// The instruction set of that name, or the best one for an empty name; null with the reason in `error`.
const Kernels* choose(const char* wanted, std::string* error) {
  const Choice choices[] = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"),
       kernels_avx512},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kernels_avx2},
#endif
      {"generic", true, kernels_generic},
  };
  std::string names;
  for (const Choice& choice : choices) {
    names += std::string(" ") + choice.name;
    if (*wanted != '\0' && std::strcmp(choice.name, wanted) != 0) continue;
    if (choice.runs_here) return &choice.get();
    if (*wanted != '\0') {
      *error = std::string("instruction set ") + wanted + ": this processor does not have it";
      return nullptr;
    }
  }
  *error = std::string("instruction set ") + wanted + ": expected one of" + names;
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

// Rows of weights that one task takes: about `bytes` of them, in whole steps of `step`.
int64_t rows_a_task(int64_t row_bytes, int64_t bytes, int64_t step) {
  return std::max<int64_t>(step, bytes / std::max<int64_t>(1, row_bytes) / step * step);
}

}  // namespace

const Kernels& kernels() { return *chosen.load(std::memory_order_acquire); }

bool type_by_name(const char* name, size_t length, QType* type) {
  for (int i = 0; i < kTypeCount; i++) {
    if (std::strlen(kTypes[i].name) == length && std::memcmp(kTypes[i].name, name, length) == 0) {
      *type = static_cast<QType>(i);
      return true;
    }
  }
  return false;
}

void decode_all(const Kernels& kernels, QType type, const uint8_t* blocks, float* out, int64_t rows,
                int64_t elements) {
  const int64_t stride = static_cast<int64_t>(row_bytes(type, elements));
  const int64_t step = rows_a_task(elements * 4, 1 << 18, 1);
  run_tasks((rows + step - 1) / step, 0, [&](int64_t task, float*) {
    for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); r++) {
      kernels.decode[static_cast<int>(type)](blocks + r * stride, out + r * elements, elements);
    }
  });
}

namespace {

struct Part {  // rows of one job's weights
  const Job* job;
  int64_t first, end;
};

void split(const Job& job, std::vector<Part>* parts) {
  const Product& p = job.product;
  if (p.count == 0) return;
  // Tasks large enough to amortise taking one, small enough to even out what the threads finish: for few
  // rows of x a stretch of memory, for many a tile of the matrix product.
  const int64_t stride = static_cast<int64_t>(row_bytes(job.type, p.elements));
  const int64_t step = p.count <= kFewRows ? rows_a_task(stride, 1 << 16, 4) : kTileRows;
  for (int64_t r = 0; r < p.rows; r += step) parts->push_back({&job, r, std::min(p.rows, r + step)});
}

// The part's rows of the job's product, into `y` (one pointer a row of x, at the part's first result).
void multiply(const Kernels& kernels, const Part& part, float* const* y, float* scratch) {
  const QType type = part.job->type;
  Product p = part.job->product;
  p.w += part.first * static_cast<int64_t>(row_bytes(type, p.elements));
  p.rows = part.end - part.first;
  p.y = y;
  const auto& table = p.count <= kFewRows ? kernels.multiply_few : kernels.multiply_many;
  table[static_cast<int>(type)](p, scratch);
}

// Jobs whose few rows of x are in the order that their kernels want.
struct Prepared {
  std::vector<Job> jobs;

  Prepared(const Kernels& kernels, const Job* given, size_t count) : jobs(given, given + count) {
    for (Job& job : jobs) {
      Product& p = job.product;
      const PrepareFn prepare = kernels.prepare[static_cast<int>(job.type)];
      if (prepare == nullptr || p.count == 0 || p.count > kFewRows) continue;
      const int64_t length = (kernels.prepared_floats(p.elements) + 15) / 16 * 16;
      rows_.emplace_back(static_cast<float*>(std::aligned_alloc(64, p.count * length * sizeof(float))), &std::free);
      std::vector<const float*> x;
      for (int64_t m = 0; m < p.count; m++) {
        x.push_back(rows_.back().get() + m * length);
        prepare(p.x[m], p.elements, rows_.back().get() + m * length);
      }
      lists_.push_back(std::move(x));
      p.x = lists_.back().data();
    }
  }

 private:
  std::vector<std::unique_ptr<float, void (*)(void*)>> rows_;
  std::list<std::vector<const float*>> lists_;
};

std::vector<float*> results(const Part& part) {
  const Product& p = part.job->product;
  std::vector<float*> y(p.y, p.y + p.count);
  for (float*& row : y) row += part.first;
  return y;
}

}  // namespace

void multiply_all(const Kernels& kernels, const Job* given, size_t count) {
  const Prepared jobs(kernels, given, count);
  std::vector<Part> parts;
  for (const Job& job : jobs.jobs) split(job, &parts);
  run_tasks(static_cast<int64_t>(parts.size()), kernels.scratch_floats, [&](int64_t i, float* scratch) {
    multiply(kernels, parts[i], results(parts[i]).data(), scratch);
  });
}

void multiply_gated(const Kernels& kernels, const Job& given_gate, const Job& given_up) {
  const Job both[] = {given_gate, given_up};
  const Prepared jobs(kernels, both, 2);
  const Job &gate = jobs.jobs[0], &up = jobs.jobs[1];
  std::vector<Part> parts;
  split(gate, &parts);
  if (parts.empty()) return;
  const int64_t count = gate.product.count, step = parts[0].end - parts[0].first;
  const size_t floats = kernels.scratch_floats + static_cast<size_t>(count * step);
  run_tasks(static_cast<int64_t>(parts.size()), floats, [&](int64_t i, float* scratch) {
    const Part &part = parts[i], same_of_up = {&up, part.first, part.end};
    const std::vector<float*> y = results(part);
    std::vector<float*> u(count);
    for (int64_t m = 0; m < count; m++) u[m] = scratch + kernels.scratch_floats + m * step;
    multiply(kernels, part, y.data(), scratch);
    multiply(kernels, same_of_up, u.data(), scratch);
    for (int64_t m = 0; m < count; m++) kernels.silu_gate(y[m], u[m], part.end - part.first);
  });
}

}  // namespace scarlet

// --- the C interface, for ctypes --------------------------------------------------------------------

extern "C" {

// Fills the codebook of that name ("iq1", "iq2_xxs", ... "sign_codes": bytes; "iq4", "e2m1": floats).
// Returns how many bytes it holds; copies only if `size` is that.
size_t scarlet_set_codebook(const char* name, const void* data, size_t size) {
  using scarlet::codebooks;
  const struct {
    const char* name;
    void* to;
    size_t size;
  } books[] = {
#define SCARLET_BOOK(book) {#book, &codebooks.book, sizeof(codebooks.book)}
      SCARLET_BOOK(iq1),     SCARLET_BOOK(iq2_xxs), SCARLET_BOOK(iq2_xs),     SCARLET_BOOK(iq2_s), SCARLET_BOOK(iq3_xxs),
      SCARLET_BOOK(iq3_s),   SCARLET_BOOK(sign_codes), SCARLET_BOOK(iq4), SCARLET_BOOK(e2m1),
#undef SCARLET_BOOK
  };
  for (const auto& book : books) {
    if (std::strcmp(book.name, name) != 0) continue;
    if (size == book.size) std::memcpy(book.to, data, size);
    return book.size;
  }
  return 0;
}

// Chooses the instruction set of that name, or the best one if it is empty, and returns its name; null, with
// the reason in `error`, if it is unknown or cannot run here. To be called before any kernel runs.
const char* scarlet_set_isa(const char* name, char* error, size_t size) {
  std::string why;
  const scarlet::Kernels* kernels = scarlet::choose(name, &why);
  if (kernels == nullptr) {
    std::strncpy(error, why.c_str(), size - 1);
    error[size - 1] = '\0';
    return nullptr;
  }
  scarlet::chosen.store(kernels, std::memory_order_release);
  return kernels->isa;
}

void scarlet_set_threads(int threads) { scarlet::set_threads(threads); }
int scarlet_threads() { return scarlet::threads(); }

// Probes for the benchmarks: read all bytes once on every thread; do `iterations` of FMAs on every thread.
float scarlet_read_all(const uint8_t* bytes, size_t size) {
  const scarlet::Kernels& k = scarlet::kernels();
  constexpr int64_t kPart = 1 << 20;
  const int64_t parts = static_cast<int64_t>(size) / kPart;
  std::vector<float> sums(parts);
  scarlet::run_tasks(parts, 0, [&](int64_t i, float*) { sums[i] = k.sum_of_bytes(bytes + i * kPart, kPart); });
  float total = 0;
  for (float sum : sums) total += sum;
  return total;
}
double scarlet_fma_all(int64_t iterations) {
  const scarlet::Kernels& k = scarlet::kernels();
  const int64_t parts = 8 * scarlet::threads();
  std::vector<double> flops(parts);
  scarlet::run_tasks(parts, 0, [&](int64_t i, float*) { flops[i] = k.fma_chain(iterations); });
  double total = 0;
  for (double n : flops) total += n;
  return total;
}

}  // extern "C"
