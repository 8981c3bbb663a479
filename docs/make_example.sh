#!/usr/bin/env bash
# Makes docs/example-report.html: a real federation of three sites with kits, on images drawn by the program itself. One of
# the sites is killed on the way and started again. About ten minutes on two cores, in the folder that is given.
set -euo pipefail
docs=$(cd "$(dirname "$0")" && pwd)
bin=${BIN:-$docs/../.venv/bin}
mkdir -p "$1" && cd "$1"
export MASKDM_CACHE=$PWD/cache

"$bin/python" -m maskdm_server.lab.faces public 6000 32 public
for site in clinic laboratory workshop; do
  "$bin/python" -m maskdm_server.lab.faces "$site" 1600 32 "$site"
  "$bin/python" -m maskdm_server.lab.faces "$site" 300 32 "held-out/$site" 1
  "$bin/python" -m maskdm_server.lab.faces "$site" 1000 32 "labelled/$site" 2
done
"$bin/python" -m maskdm_server.lab.faces public 1000 32 labelled/public 2
"$bin/maskdm-server" features --data labelled --out Faces.safetensors --image-size 32 --epochs 6
"$bin/maskdm-server" pretrain --data public --out prior --size tiny --image-size 32 --mask-ratio 0.75 --block-size 2 \
  --prediction x0 --images 100K --batch-size 64 --lr 1e-3 --betas 0.9,0.95 --warmup-images 2000
"$bin/maskdm-server" provision --out kits --server 127.0.0.1:8471 --client clinic --client laboratory --client workshop \
  --no-approval

"$bin/maskdm-server" serve --prior prior/prior.safetensors --out consortium --tls kits/server --host 127.0.0.1 --rounds 10 \
  --min-clients 3 --local-images 1024 --lr 5e-4 --keep-every 1 &
server=$!
join() {
  "$bin/maskdm-client" --data "$1" --kit "kits/$1.zip" --out "site-$1" --threads 1 &
}
join clinic; join laboratory; join workshop
workshop=$!
while [ "$(cat consortium/rounds.jsonl 2>/dev/null | wc -l)" -lt 3 ]; do sleep 0.5; done
kill -KILL "$workshop"
while [ "$(wc -l < consortium/rounds.jsonl)" -lt 5 ]; do sleep 0.5; done
join workshop
wait "$server"
wait

for round in 000002 000004 000006 000008; do
  "$bin/maskdm-server" evaluate --model "consortium/rounds/$round.safetensors" --reference held-out --split all --count 900 \
    --features Faces.safetensors --json "consortium/evaluations/round-$round.json"
done
for model in prior model; do
  "$bin/maskdm-server" evaluate --model "consortium/$model.safetensors" --reference held-out --split all --count 900 \
    --features Faces.safetensors
done
"$bin/maskdm-server" report consortium
cp consortium/report.html "$docs/example-report.html"
