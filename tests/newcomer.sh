#!/usr/bin/env bash
# A newcomer's first hour, as the README tells it: init, check, run, feed, status, export, pull --follow, eval, stop.
# In an empty folder, with `anytimed` on the PATH; about a minute. Prints what a newcomer sees; any failure ends it.
#   newcomer.sh FOLDER
set -euo pipefail
cd "${1:?usage: newcomer.sh FOLDER}"
say() { printf '\n$ %s\n' "$*"; "$@"; }
daemon='' follower=''
ended() { for pid in $daemon $follower; do kill "$pid" 2>/dev/null || true; done; }
trap ended EXIT

mkdir texts
for n in $(seq 1 40); do echo "text $n: $(seq -s ' ' "$n" $((n + 60)))" > "texts/$n.txt"; done

say anytimed init my.toml
# What a newcomer edits: a model for a laptop, data of their own, and an inbox to feed.
sed -i -e 's/^hidden_size = .*/hidden_size = 32/' -e 's/^layers = .*/layers = 2/' -e 's/^heads = .*/heads = 2/' \
  -e 's/^sequence_length = .*/sequence_length = 64/' -e 's/^batch_size = .*/batch_size = 4/' \
  -e 's|^url = "{stdlib}.*|url = "texts/*.txt"|' -e '/^exclude = /d' -e 's/^# fraction = .*/fraction = 0.1/' \
  -e 's/^# every_steps = 100 .*/every_steps = 10/' my.toml
printf '\n[sources.mine]\ntype = "inbox"\nwhen_dry = "others"\n' >> my.toml
say anytimed check my.toml

echo; echo '$ anytimed run my.toml &'
anytimed run my.toml > run.log 2>&1 & daemon=$!
for _ in $(seq 600); do
  grep -q 'waiting for data' <(anytimed status state/run 2>/dev/null || true) && break
  kill -0 "$daemon" || { cat run.log; exit 1; }
  sleep 0.2
done

for n in $(seq 1 30); do echo "{\"text\": \"fed record $n, $(seq -s ' ' 100 160)\"}"; done > mine.jsonl
say anytimed feed state/run mine.jsonl --source mine
for _ in $(seq 600); do
  anytimed status state/run --json | python3 -c '
import json, sys; status = json.load(sys.stdin); source = status["sources"]["mine"]
sys.exit(not (source["records"] + source["held_out"] == 30 and status["state"] == "waiting for data"))' && break
  sleep 0.2
done
say anytimed status state/run
say anytimed export state/run

echo; echo '$ anytimed pull state/published --to model --follow --exec "…" &'
anytimed pull state/published --to model --follow --every 1 --exec 'cp {path}/manifest.json told.json' > follow.log 2>&1 & follower=$!
for _ in $(seq 300); do [ -f told.json ] && break; sleep 0.2; done
[ -f told.json ] || { cat follow.log; exit 1; }
first=$(readlink model/current)
echo 'more to learn from, later' > texts/.new; for n in $(seq 50 90); do seq -s ' ' "$n" $((n + 200)) > "texts/.$n"; mv "texts/.$n" "texts/$n.txt"; done
before=$(anytimed status state/run --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["step"])')
for _ in $(seq 600); do
  step=$(anytimed status state/run --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["step"])')
  [ "$step" -gt "$before" ] && break
  sleep 0.2
done
say anytimed export state/run
for _ in $(seq 300); do [ "$(readlink model/current)" != "$first" ] && break; sleep 0.2; done
[ "$(readlink model/current)" != "$first" ] || { cat follow.log; exit 1; }
kill -TERM "$follower"; wait "$follower"; follower=''

say anytimed eval model --data 'texts/*.txt'
say anytimed events state/run -n 5
say anytimed stop state/run
wait "$daemon"; daemon=''
say anytimed verify state/run
