#!/usr/bin/env bash
# `make demo`: make a model, look at it, run it, and hold every activation against llama.cpp's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
model=$folder/tiny.gguf

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "A random model of the Qwen3.5 architecture, packed by llama.cpp's quantiser (its text will be noise)"
scarlet synth "$model" --size tiny --quant Q4_K_M
scarlet inspect "$model"

say "It generates, straight from the packed blocks"
scarlet generate "$model" -p "Hello" -n 24 --temperature 0 --stats

say "Every activation of both engines, compared"
scarlet taps "$model" -p "Hello, world" -o "$folder/ours.safetensors"
scarlet taps "$model" -p "Hello, world" -o "$folder/theirs.safetensors" --engine llama.cpp
scarlet parity "$folder/ours.safetensors" "$folder/theirs.safetensors" --model "$model"

say "The fault that this project was born from, put into a copy of a decoder and found again"
scarlet drill
