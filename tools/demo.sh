#!/usr/bin/env bash
# `make demo`: the model in the box speaks; every activation is held against llama.cpp's; a fault is put in and found.
set -euo pipefail

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
ask() { printf '\n\033[2m%s\033[0m' "$1" && scarlet generate -p "$1" "${@:2}"; }

say "1. The model in the box (3.9 million parameters, 3 MB, Q4_K, Q5_K and Q6_K) tells a story, remembers, copies, adds"
ask "One day, Rosa ran to the" --raw -n 64 --stats
ask $'Remember: apple is star, plum is rope, corn is silk.\nWhat is plum? It is'
ask $'Copy: rain star gold wool fire.\nAgain:'
ask "7 + 8 ="

say "2. Every activation, compared with llama.cpp's on the same file (noise: they differ by their rounding, no more)"
scarlet parity --against llama.cpp

say "3. The drill: the fault that this project was born from, put into a copy of a decoder and found again"
scarlet drill

say "Next: scarlet chat, scarlet inspect, scarlet --help; docs/ has a page for each"
