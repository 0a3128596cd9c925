#!/bin/sh
# What only a GPU can show: the tests that need one, then what guidance costs with random weights.
#   sh benchmarks/gpu_checks.sh OUT SERVED_CONFIG.json LENVM_CONFIG.json TOKENIZER_FOLDER [CONCURRENCY...]
# Logs and figures go to OUT. A part that fails does not stop the next; the exit status is that of the worst.
set -u
out=$1 served=$2 lenvm=$3 tokenizer=$4
shift 4
python=${PYTHON:-.venv/bin/python}
status=0

part() {
    name=$1
    shift
    echo "$name"
    if "$@" > "$out/$name.log" 2>&1; then tail -n 3 "$out/$name.log"; else status=1; tail -n 20 "$out/$name.log"; fi
}

mkdir -p "$out"
part kernels "$python" -m pytest -q -m gpu tests/kernels tests/runtime/test_value_step.py
# Products of fp32 stay fp32 in Triton, as in the plain forwards that the tests compare with.
part value_model env TRITON_F32_DEFAULT=ieee "$python" -m pytest -q tests/runtime/test_value_model.py
part steps env TRITON_F32_DEFAULT=ieee "$python" -m pytest -q tests/e2e/test_steps_in_a_batch.py
models=$(mktemp -d)/models
part models "$python" benchmarks/random_models.py "$models" --served "$served" --lenvm "$lenvm" --tokenizer "$tokenizer"
for concurrency in "${@:-50}"; do
    part "guided_$concurrency" "$python" benchmarks/bench_guided.py --quick --json "$out/guided_$concurrency.json" \
        --concurrency "$concurrency" --tokens 300 \
        --model "$models/served" --lenvm "$models/lenvm" --head "$models/head" -- \
        --load-format dummy --mem-fraction-static 0.75 --cuda-graph-max-bs-decode "$concurrency" \
        --max-running-requests "$concurrency"
done
exit $status
