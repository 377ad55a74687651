#!/usr/bin/env bash
# A newcomer's first hour, as the README tells it: init, check, run, feed, status, export, pull --follow, eval, stop.
# In an empty folder, with `anytimed` on the PATH; about a minute. Prints what a newcomer sees; any failure ends it.
#   newcomer.sh FOLDER
set -euo pipefail
cd "${1:?usage: newcomer.sh FOLDER}"
say() { printf '\n$ %s\n' "$*"; "$@"; }
# until_ WHAT COMMAND…: once a second until the command succeeds; after two minutes the end
until_() { local what=$1; shift; for _ in $(seq 120); do "$@" && return 0; sleep 1; done; echo "never: $what"; cat run.log; exit 1; }
told() { anytimed status state/run --json 2>/dev/null | python3 -c "import json, sys; status = json.load(sys.stdin); sys.exit(not ($1))" 2>/dev/null; }
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
sed -i 's/^# when_dry = "wait" .*/when_dry = "others"/' my.toml
printf '\n[sources.mine]\ntype = "inbox"\nwhen_dry = "others"\n' >> my.toml
say anytimed check my.toml

echo; echo '$ anytimed run my.toml &'
anytimed run my.toml > run.log 2>&1 & daemon=$!
until_ 'everything read' told 'status["state"] == "waiting for data"'

for n in $(seq 1 30); do echo "{\"text\": \"fed record $n, $(seq -s ' ' 100 160)\"}"; done > mine.jsonl
say anytimed feed state/run mine.jsonl --source mine
until_ 'trained on what was fed' told 'status["sources"]["mine"]["records"] + status["sources"]["mine"]["held_out"] == 30 and status["state"] == "waiting for data"'
say anytimed status state/run
say anytimed export state/run

echo; echo '$ anytimed pull state/published --to model --follow --exec "…" &'
anytimed pull state/published --to model --follow --every 1 --exec 'cp {path}/manifest.json told.json' > follow.log 2>&1 & follower=$!
until_ 'pulled, and the command ran' test -f told.json
first=$(readlink model/current)
for n in $(seq 50 90); do seq -s ' ' "$n" $((n + 200)) > "texts/.$n"; mv "texts/.$n" "texts/$n.txt"; done
until_ 'trained on the new files' told 'status["sources"]["main"]["entries"] == 81 and status["state"] == "waiting for data"'
say anytimed export state/run
followed() { [ "$(readlink model/current)" != "$first" ]; }
until_ 'the newer checkpoint in place' followed
kill -TERM "$follower"; wait "$follower"; follower=''

say anytimed eval model --data 'texts/*.txt'
say anytimed events state/run -n 5
say anytimed stop state/run
wait "$daemon"; daemon=''
say anytimed verify state/run
