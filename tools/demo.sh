#!/usr/bin/env bash
# `make demo`: the model in the box speaks; every activation is held against llama.cpp's; a fault is put in and found.
set -euo pipefail

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
ask() { printf '\n\033[2m%s\033[0m' "$1" && scarlet generate -p "$1" "${@:2}" && echo; }

say "The model in the box: 3.9 million parameters, in the mix of Q4_K, Q5_K and Q6_K that llama.cpp makes"
scarlet inspect

say "It tells a story, remembers, copies and adds"
ask "One day, Rosa ran to the" --raw -n 62 --stats
ask $'Remember: apple is star, plum is rope, corn is silk.\nWhat is plum? It is'
ask $'Copy: rain star gold wool fire.\nAgain:'
ask "7 + 8 ="

say "Every activation, compared with llama.cpp's on the same file"
scarlet parity --against llama.cpp

say "The fault that this project was born from, put into a copy of a decoder and found again"
scarlet drill
