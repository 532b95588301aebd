#include "library.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "fixed.h"
#include "team.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace scarlet {

Codebooks codebooks;

namespace {

struct Choice {
  const char* name;
  bool runs_here;
  const Kernels& (*get)();
};

// Whether there is a matrix unit, and the system lets this process use it: its state is large, so that Linux
// keeps it for those threads alone whose process has asked.
bool matrix_unit_granted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kVectorBf16 = 1u << 5;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectorBf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// The instruction set of that name, or the best one for an empty name; null with the reason in `error`.
const Kernels* choose(const char* wanted, std::string* error) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  const Choice choices[] = {
#if defined(__x86_64__)
      {"amx", vnni && matrix_unit_granted(), kernels_amx},
      {"avx512vnni", vnni, kernels_avx512vnni},
      {"avx512", avx512, kernels_avx512},
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

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Aligned = std::unique_ptr<T[], Free>;
template <class T>
Aligned<T> aligned(size_t count) {
  return Aligned<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}

// Rows of x as kernels want them, made once for all the jobs of a call that want them so.
class PreparedRows {
 public:
  const float* row(const FewKernels& few, const float* x, int64_t elements) {
    const auto [at, missing] = rows_.try_emplace({few.prepare, x, elements});
    if (missing) {
      at->second = aligned<float>(few.prepared_floats(elements));
      few.prepare(x, elements, at->second.get());
    }
    return at->second.get();
  }

  const uint8_t* rounded(const FixedKernels& fixed, QType type, int planes, const Product& p) {
    std::vector<const float*> x(p.x, p.x + p.count);
    const auto [at, missing] = rounded_.try_emplace({type, planes, p.elements, std::move(x)});
    if (missing) {
      at->second = aligned<uint8_t>(p.count * fixed.rounded_bytes(type, planes, p.elements));
      run_tasks(p.count, 0, [&, to = at->second.get()](int64_t m, float*) {
        fixed.round(type, planes, p.x[m], p.elements, m, p.count, to);
      });
    }
    return at->second.get();
  }

 private:
  std::map<std::tuple<PrepareFn, const float*, int64_t>, Aligned<float>> rows_;
  std::map<std::tuple<QType, int, int64_t, std::vector<const float*>>, Aligned<uint8_t>> rounded_;
};

// A job whose rows of x are in the form that its kernels want: as they are, in another order, split into
// bf16, or in whole numbers.
struct Ready {
  QType type;
  Product product;
  FewKernels few{};                     // if count <= kFewRows
  const MatrixUnit* matrix = nullptr;   // else, what takes the job, if not kernels.multiply_many
  const FixedKernels* fixed = nullptr;
  SplitRows split{};                    // if matrix
  int planes = 0;                       // if fixed
  const uint8_t* rounded = nullptr;

  Ready(const Kernels& kernels, const Job& job, PreparedRows* rows) : type(job.type), product(job.product) {
    const FixedKernels* offered = kernels.fixed;
    if (offered != nullptr && !offered->covers(type, product.elements)) offered = nullptr;
    planes = job.fast ? kFastPlanes : kExactPlanes;
    if (product.count == 0) return;
    if (product.count <= kFewRows) {
      few = offered != nullptr ? offered->few(type, planes) : kernels.few[static_cast<int>(type)];
      if (few.prepare != nullptr) reorder(rows);
    } else if (kernels.matrix != nullptr) {
      split_terms(*kernels.matrix, job.fast ? 2 : 3);
    } else if (offered != nullptr) {
      fixed = offered;
      rounded = rows->rounded(*offered, type, planes, product);
    }
  }

  int64_t step() const {  // rows of weights that a task takes
    // Enough to amortise taking one, and few enough to even out what the threads finish: for few rows of x
    // a stretch of memory, for many a tile of the matrix product.
    if (fixed != nullptr) return kFixedTileRows;
    if (matrix != nullptr) return matrix->tile_rows;
    if (product.count > kFewRows) return kTileRows;
    // Each stretch begins with memory that nothing asked for early: the fewer the better, but eight a thread.
    const int64_t row = static_cast<int64_t>(row_bytes(type, product.elements));
    return rows_a_task(row, std::clamp<int64_t>(row * product.rows / (8 * threads()), 1 << 16, 1 << 18), 4);
  }
  size_t scratch_floats(const Kernels& kernels) const {
    if (matrix != nullptr) return matrix->scratch_floats;
    return fixed != nullptr ? fixed->scratch_floats : kernels.scratch_floats;
  }

 private:
  void reorder(PreparedRows* rows) {
    for (int64_t m = 0; m < product.count; m++) {
      x_.push_back(rows->row(few, product.x[m], product.elements));
    }
    product.x = x_.data();
  }
  void split_terms(const MatrixUnit& unit, int terms) {
    matrix = &unit;
    split = {product.count, product.elements, terms, nullptr};
    terms_ = aligned<uint16_t>(unit.split_size(split));
    split.tiles = terms_.get();
    run_tasks((product.count + kSplitGroup - 1) / kSplitGroup, 0,
              [&](int64_t group, float*) { unit.split(product.x, group, split); });
  }

  Aligned<uint16_t> terms_;
  std::vector<const float*> x_;
};

struct Part {  // rows of one job's weights
  const Ready* job;
  int64_t first, end;
};

void split(const Ready& job, int64_t step, std::vector<Part>* parts) {
  const Product& p = job.product;
  if (p.count == 0) return;
  for (int64_t r = 0; r < p.rows; r += step) parts->push_back({&job, r, std::min(p.rows, r + step)});
}

// The part's rows of the job's product, into `y` (one pointer a row of x, at the part's first result).
void multiply(const Kernels& kernels, const Part& part, float* const* y, float* scratch) {
  const Ready& job = *part.job;
  Product p = job.product;
  p.w += part.first * static_cast<int64_t>(row_bytes(job.type, p.elements));
  p.rows = part.end - part.first;
  p.y = y;
  if (job.fixed != nullptr) return job.fixed->multiply(job.type, job.planes, p, job.rounded, scratch);
  if (job.matrix != nullptr) return job.matrix->multiply(kernels, job.type, p, job.split, scratch);
  (p.count <= kFewRows ? job.few.multiply : kernels.multiply_many[static_cast<int>(job.type)])(p, scratch);
}

std::vector<float*> results(const Part& part) {
  const Product& p = part.job->product;
  std::vector<float*> y(p.y, p.y + p.count);
  for (float*& row : y) row += part.first;
  return y;
}

}  // namespace

void multiply_all(const Kernels& kernels, const std::vector<Job>& given) {
  PreparedRows rows;
  std::list<Ready> jobs;
  std::vector<Part> parts;
  size_t floats = 0;
  for (const Job& job : given) {
    jobs.emplace_back(kernels, job, &rows);
    split(jobs.back(), jobs.back().step(), &parts);
    floats = std::max(floats, jobs.back().scratch_floats(kernels));
  }
  run_tasks(static_cast<int64_t>(parts.size()), floats, [&](int64_t i, float* scratch) {
    multiply(kernels, parts[i], results(parts[i]).data(), scratch);
  });
}

void multiply_gated(const Kernels& kernels, const std::vector<Job>& gates, const std::vector<Job>& ups) {
  PreparedRows rows;
  std::list<Ready> jobs;  // a gate, then its up
  std::vector<Part> of_gates, of_ups;
  size_t for_kernels = 0, for_up = 0;
  for (size_t i = 0; i < gates.size(); i++) {
    const Ready& gate = jobs.emplace_back(kernels, gates[i], &rows);
    const Ready& up = jobs.emplace_back(kernels, ups[i], &rows);
    const int64_t step = std::min(gate.step(), up.step());
    split(gate, step, &of_gates);
    split(up, step, &of_ups);
    for_kernels = std::max({for_kernels, gate.scratch_floats(kernels), up.scratch_floats(kernels)});
    for_up = std::max(for_up, static_cast<size_t>(gate.product.count * step));
  }
  run_tasks(static_cast<int64_t>(of_gates.size()), for_kernels + for_up, [&](int64_t i, float* scratch) {
    const std::vector<float*> y = results(of_gates[i]);
    const int64_t rows = of_gates[i].end - of_gates[i].first;
    std::vector<float*> u(y.size());
    for (size_t m = 0; m < u.size(); m++) u[m] = scratch + for_kernels + m * rows;
    multiply(kernels, of_gates[i], y.data(), scratch);
    multiply(kernels, of_ups[i], u.data(), scratch);
    for (size_t m = 0; m < u.size(); m++) kernels.silu_gate(y[m], u[m], rows);
  });
}

}  // namespace scarlet

// --- the C interface, for ctypes --------------------------------------------------------------------

extern "C" {

// Names the sources that the library was compiled from (build.py's fingerprint).
const char* scarlet_sources() { return SCARLET_SOURCES; }

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
      SCARLET_BOOK(iq1),        SCARLET_BOOK(iq2_xxs), SCARLET_BOOK(iq2_xs),
      SCARLET_BOOK(iq2_s),      SCARLET_BOOK(iq3_xxs), SCARLET_BOOK(iq3_s),
      SCARLET_BOOK(sign_codes), SCARLET_BOOK(iq4),     SCARLET_BOOK(e2m1),
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

// Whether the fast mode covers the type of that name here.
bool scarlet_rounds(const char* name) {
  const scarlet::Kernels& kernels = scarlet::kernels();
  scarlet::QType type;
  if (!scarlet::type_by_name(name, std::strlen(name), &type)) return false;
  return kernels.matrix != nullptr || (kernels.fixed != nullptr && kernels.fixed->covers(type, 256));
}

void scarlet_set_threads(int threads) { scarlet::set_threads(threads); }
int scarlet_threads() { return scarlet::threads(); }

// Probes for the benchmarks: read all bytes once on every thread; do `iterations` of FMAs on every thread.
float scarlet_read_all(const uint8_t* bytes, size_t size) {
  const scarlet::Kernels& k = scarlet::kernels();
  constexpr int64_t kPart = 1 << 20;
  const int64_t parts = static_cast<int64_t>(size) / kPart;
  std::vector<float> sums(parts);
  scarlet::run_tasks(parts, 0,
                     [&](int64_t i, float*) { sums[i] = k.sum_of_bytes(bytes + i * kPart, kPart); });
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
