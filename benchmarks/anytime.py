"""One configuration, every horizon: is one run, at every moment, as good as a run that was tuned for that moment?

The daemon itself trains a byte model of half a million parameters on the Python standard library's sources. One run
each of SF-NorMuon, AMUSE and Schedule-Free AdamW, with one configuration, is measured at T, 2T, 4T and 8T. Against it
stand, for each of these horizons, AdamW and NorMuon under a cosine and Muon under warmup-stable-decay
(`horizons/rivals.py`), which know when they end, each with the learning rate that is best for just that horizon
(`horizons/tuning.py`).

    .venv/bin/python benchmarks/anytime.py            under two hours on two cores; finished runs are kept
    .venv/bin/python benchmarks/anytime.py --quick    a smaller model, two horizons of some steps: does it work at all?
    .venv/bin/python benchmarks/anytime.py --report   table and picture from the JSON; trains nothing
    .venv/bin/python benchmarks/anytime.py --gpu --texts '/data/**/*.txt' --minutes 60
                                                      20.7 M parameters on CUDA, 500 MB of your own text, one seed: as
                                                      many of the runs as end in time (`horizons/larger.py`), to 8 T =
                                                      414 M tokens, twenty a parameter (--multiples 8,16,32,64 for one
                                                      to eight times that). Adds tokens/s, and MFU with --peak-tflops

Every run is a process of its own, one thread each (with --quick they share one). What was seen in it is kept under
.anytimed/anytime/ and taken from there where run, texts, torch and Python are the same. Needs no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from horizons import command, larger, picture, report, tuning
from horizons.plans import FAMILIES, FULL, GPU, ONE_CONFIGURATION, QUICK, RIVALS, Scale, one_run, rival_run
from horizons.trainer import Trainer, last
from horizons.tuning import best_of, tuned

from anytimed.contracts import Json


def measured(trainer: Trainer) -> Json:
    """Train everything. `one`: what each one run saw, by seed; `rivals`: by kind and horizon the learning rates that
    were tried (first seed), and the best one's losses, by seed for the best of those that decide."""
    scale = trainer.scale
    seeds = range(1, scale.seeds + 1)

    def tried(kind: str, horizon: int) -> dict[float, float | None]:
        def losses(rates: Sequence[float]) -> list[float | None]:
            return [last(f) for f in trainer.all_of([rival_run(kind, horizon, lr, scale, 1) for lr in rates])]

        return tuned(RIVALS[kind].centre, losses)

    def family(kinds: Sequence[str], horizon: int) -> dict[str, Json]:
        found = {kind: tried(kind, horizon) for kind in kinds}
        rates = {kind: best_of(by_rate) for kind, by_rate in found.items()}
        ahead = best_of({kind: found[kind][rates[kind]] for kind in kinds})
        by_kind: dict[str, Json] = {}
        for kind, lr in rates.items():
            more = seeds if kind == ahead and RIVALS[kind].decides else seeds[:1]
            ends = trainer.all_of([rival_run(kind, horizon, lr, scale, seed) for seed in more])
            by_kind[kind] = tuning.told(found[kind], lr, [last(f) for f in ends])
        return by_kind

    def one(kind: str) -> list[Json]:
        found = trainer.all_of([one_run(kind, scale, seed) for seed in seeds])
        return [{name: f[name] for name in ("seen", "forgets")} for f in found]

    horizons = sorted(scale.horizons, reverse=True)  # the longest first: nothing waits for one at the end
    with ThreadPoolExecutor(64) as asking:
        ones = {kind: asking.submit(one, kind) for kind in ONE_CONFIGURATION}
        rivals = {(name, h): asking.submit(family, kinds, h) for h in horizons for name, kinds in FAMILIES.items()}
        return {
            "one": {kind: asked.result() for kind, asked in ones.items()},
            "rivals": {
                kind: {str(h): rivals[name, h].result()[kind] for h in scale.horizons}
                for name, kinds in FAMILIES.items()
                for kind in kinds
            },
        }


def speed_of(trainer: Trainer, kinds: Iterable[str], peak_tflops: float | None) -> Json:
    """Tokens a second of the one runs, and how much of the device's peak that is: 6 N + 12 L d c operations a token,
    with N parameters, L layers of width d, and c tokens of context (PaLM, arXiv 2204.02311, appendix B)."""
    scale = trainer.scale
    found: Json = {}
    for kind in kinds:
        run = trainer.found[f"{kind}@1"]
        found[kind] = {"tokens_per_s": run["tokens_per_s"]}
        if peak_tflops and run["tokens_per_s"]:
            operations = 6 * run["parameters"] + 12 * scale.layers * scale.hidden * scale.context
            found[kind]["mfu"] = round(operations * run["tokens_per_s"] / (peak_tflops * 1e12), 4)
    return found


def told(trainer: Trainer, minutes: float | None, peak_tflops: float | None) -> Json:
    scale = trainer.scale
    found = larger.measured(trainer, minutes) if scale.gpu else measured(trainer)
    return {
        "one_configuration": {kind: one_run(kind, scale, 1).optimizer for kind in found["one"]},
        "speed": speed_of(trainer, found["one"], peak_tflops),
        "table": (table := report.table_of(found, scale)),
        "bars": report.bars(table, scale),
        **found,
    }


def parsed() -> argparse.Namespace:
    parser = command.parser(__doc__, "anytime")
    parser.add_argument("--quick", action="store_true", help="a smaller model, two short horizons: whether it works")
    parser.add_argument("--gpu", action="store_true", help="20.7 M parameters on CUDA, on your own --texts")
    parser.add_argument("--minutes", type=float, help="with --gpu: leave out runs that would not end within these")
    parser.add_argument("--texts", help="a glob of text files to train and measure on, instead of Python's library")
    parser.add_argument("--multiples", type=multiples, help="horizons, in T: 1,2,4,8")
    parser.add_argument("--peak-tflops", type=float, help="of the device in the precision that is used; for the MFU")
    parser.add_argument("--assert", dest="insist", action="store_true", help="exit with 1 where a bar is missed")
    parser.set_defaults(json=None)
    arguments = parser.parse_args()
    if arguments.json is None:
        arguments.json = command.RESULTS / ("anytime_gpu.json" if arguments.gpu else "anytime.json")
    if arguments.minutes is not None and not arguments.gpu:
        parser.error("--minutes: only with --gpu; without it every run is trained, and stopped it goes on")
    if arguments.gpu:
        arguments.jobs = 1
        if not (arguments.texts or arguments.report):
            parser.error("--gpu: give --texts as well; Python's library is too small for it")
    return arguments


def multiples(text: str) -> tuple[int, ...]:
    """For argparse: ascending whole numbers."""
    found = tuple(int(part) for part in text.split(",") if part.isdigit() and int(part))
    if len(found) != len(text.split(",")) or list(found) != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text}: expected ascending whole numbers, as 1,2,4")
    return found


def scale_of(arguments: argparse.Namespace) -> Scale:
    scale = QUICK if arguments.quick else GPU if arguments.gpu else FULL
    return scale.to(arguments.multiples) if arguments.multiples else scale


def main() -> int:
    arguments = parsed()
    scale = scale_of(arguments)
    result = command.result_of(
        arguments,
        scale,
        lambda trainer: told(trainer, arguments.minutes, arguments.peak_tflops),
        here=arguments.quick,
        texts=arguments.texts,
    )
    arguments.json.with_suffix(".svg").write_text(picture.drawn(result), encoding="utf-8")
    command.show(report.tables(result))
    return int(arguments.insist and command.missed(result["bars"]))


if __name__ == "__main__":
    sys.exit(main())
