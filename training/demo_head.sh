#!/bin/sh
# The whole training path at a small size: sh training/demo_head.sh FOLDER, with LENVM_ENGINE_URL and LENVM_MODEL set.
set -e
out=$1
run=".venv/bin/python -m lenvm_training"
mkdir -p "$out"
[ -f "$out/prompts.jsonl" ] || $run prompts --out "$out/prompts.jsonl" --templates 40 --seed 0
[ -f "$out/eval_prompts.jsonl" ] ||
    $run prompts --out "$out/eval_prompts.jsonl" --templates 8 --seed 1 --exclude "$out/prompts.jsonl"
$run rollouts --prompts "$out/prompts.jsonl" --out "$out/rollouts.jsonl" --samples 3 --max-new-tokens 256
$run rollouts --prompts "$out/eval_prompts.jsonl" --out "$out/eval.jsonl" --samples 4 --max-new-tokens 256
$run train --rollouts "$out/rollouts.jsonl" --eval-rollouts "$out/eval.jsonl" --work "$out/states" --out "$out/head"
