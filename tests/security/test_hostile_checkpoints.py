"""A checkpoint's folder as an attacker would write it, on every way in: pull, sample, init_from, a commit that is
restored, a spool that is sent. Each is a named error; nothing is read outside the folder, nothing is unpickled."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anytimed.config import load
from anytimed.contracts import AnytimedError, ConfigError, CorruptError
from anytimed.service.assembly import initial_weights, parts_of
from anytimed.service.reader_side import load_checkpoint
from anytimed.service.recovery import recover
from anytimed.storage.manifest import CommitManifest
from anytimed.storage.pull import pull
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.spool import Spool
from anytimed.storage.store import Store
from anytimed.storage.strangers import check_folder, weight_files
from anytimed_adapters.models.llama import LlamaModel, LlamaSettings
from anytimed_adapters.tokenizers.bytes import ByteTokenizer
from tests import tiny
from tests.security.test_hostile_bytes import BOMBS, LYING
from tests.storage.material import Site, content

ROOT = Path(__file__).parent.parent.parent
SETTINGS = LlamaSettings(hidden_size=32, layers=2, heads=2, intermediate_size=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint: config.json, model.safetensors, tokenizer files."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    model = LlamaModel(SETTINGS)
    torch.manual_seed(0)
    save_file({n: p.detach().clone() for n, p in model.build(257).named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.hf_config(257, 256)))
    ByteTokenizer(ByteTokenizer.Settings(), folder).save(folder)
    return folder


def sharded(folder: Path) -> dict[str, str]:
    """The same in two shards and an index; the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, some in shards.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    found = {name: file for file, some in shards.items() for name in some}
    index(folder, found)
    return found


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_config(folder: Path, **changes: Any) -> None:
    told = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))


def sampled(folder: Path) -> None:
    load_checkpoint(folder)


def begun(folder: Path) -> None:
    """As `[model] init_from` does it."""
    tiny.write_text(folder.parent / "data", 3)
    parts = parts_of(load(tiny.config(folder.parent)))
    (folder.parent / "cache").mkdir(exist_ok=True)
    initial_weights(parts, str(folder), folder.parent / "cache")


def fetched(folder: Path) -> None:
    """As `init_from` at a URL of a Hugging Face folder does it."""
    tiny.write_text(folder.parent / "data", 3)
    parts = parts_of(load(tiny.config(folder.parent)))
    cache = folder.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    initial_weights(parts, f"file://{folder}", cache)


WAYS = [sampled, begun, fetched]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_the_good_one_loads(folder: Path, way: Callable[[Path], None], shards: bool) -> None:
    if shards:
        sharded(folder)
    way(folder)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("lie", ["length beyond the file", "deep", "overlapping", "negative sizes whose product fits",
                                 "two tensors of one name", "unknown dtype", "a product of 2^64", "empty"])  # fmt: skip
def test_lying_headers(folder: Path, way: Callable[[Path], None], lie: str) -> None:
    (folder / "model.safetensors").write_bytes(LYING[lie])
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        way(folder)


@pytest.mark.parametrize("way", [sampled, begun], ids=lambda way: way.__name__)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, way: Callable[[Path], None], value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptError, match=r"model\.norm\.weight holds NaN or Inf"):
        way(folder)


OUTSIDE = [
    "../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", ".hidden.safetensors", "a.bin", "model.pt",
    "a\0.safetensors", "a\\b.safetensors", 7, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("way", [sampled, begun], ids=lambda way: way.__name__)
def test_an_index_leads_nowhere_else(folder: Path, way: Callable[[Path], None], name: Any) -> None:
    found = sharded(folder)
    shutil.copy(folder / "a.safetensors", folder.parent / "outside.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "a.safetensors", folder / "sub" / "a.safetensors")
    index(folder, {**found, next(iter(found)): name})
    with pytest.raises(CorruptError, match=r"index\.json: tensor"):
        way(folder)


@pytest.mark.parametrize("weight_map", [{}, [], "a", None, {"ghost": "a.safetensors"}, {"ghost": "c.safetensors"}])
def test_an_index_that_does_not_fit(folder: Path, weight_map: Any) -> None:
    sharded(folder)
    index(folder, weight_map)
    with pytest.raises(CorruptError):
        weight_files(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(CorruptError, match="in another file too"):
        sampled(folder)


# --- config.json, tokenizer.json --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("bomb", [name for name in BOMBS if not name.startswith("a text")])
def test_bombs_as_config(folder: Path, way: Callable[[Path], None], bomb: str) -> None:
    (folder / "config.json").write_bytes(BOMBS[bomb])
    with pytest.raises((CorruptError, ConfigError)) as caught:
        way(folder)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**12, "num_attention_heads": 1, "head_dim": None},
        {"hidden_size": 10**40, "num_attention_heads": 1, "head_dim": None},
        {"num_attention_heads": 0, "head_dim": None},
        {"num_attention_heads": -2, "head_dim": None},
        {"intermediate_size": 10**15},
        {"vocab_size": 10**15},
        {"vocab_size": -1},
        {"vocab_size": "257"},
        {"vocab_size": None},
        {"hidden_size": "32"},
        {"hidden_size": [32]},
        {"rope_theta": "x"},
        {"rope_scaling": ["x"]},
        {"rms_norm_eps": -1},
        {"model_type": ["llama"]},
        {"model_type": "gpt_pickle"},
        {"max_position_embeddings": 10**30},
        {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"},
    ],
    ids=lambda changes: ",".join(f"{k}={str(v)[:12]}" for k, v in changes.items()),
)
@pytest.mark.parametrize("way", [sampled, begun], ids=lambda way: way.__name__)
def test_configs_that_describe_monsters(folder: Path, way: Callable[[Path], None], changes: Any) -> None:
    """In no time and no memory: a billion layers are refused before one of them is built."""
    change_config(folder, **changes)
    try:
        way(folder)
    except AnytimedError as error:
        assert len(str(error)) < 1500
    else:
        # init_from takes shapes and vocabulary from [model] and [tokenizer]; what is not asked for cannot harm
        assert changes.keys() <= {"vocab_size", "max_position_embeddings"}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_bombs_as_tokenizer(folder: Path, file: str, bomb: str) -> None:
    (folder / file).write_bytes(BOMBS[bomb])
    try:
        sampled(folder)
    except ConfigError as error:
        assert file in str(error) and len(str(error)) < 1500
    else:
        assert file == "tokenizer_config.json", "the bombs that are objects name no token; the usual one is taken"


# --- pickles ----------------------------------------------------------------------------------------------------------


class Explosive:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_pickle_beside_the_weights_is_never_opened(folder: Path, tmp_path: Path, way: Callable[[Path], None]) -> None:
    trace = tmp_path / "exploded"
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "consolidated.pkl",
        "training_args.bin",
        "a.safetensors.bin",
    ):
        (folder / name).write_bytes(pickle.dumps(Explosive(trace)))
    way(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        way(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Explosive(trace)))
    with pytest.raises(CorruptError):
        way(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Explosive(trace)))  # noqa: S301 - it would have
    assert trace.exists()


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input"}
FORBIDDEN_NAMES = {
    ("torch", "load"), ("torch", "save"), ("torch.serialization", "load"), ("yaml", "load"), ("os", "system"),
    ("os", "popen"), ("np", "load"), ("numpy", "load"), ("joblib", "load"), ("marshal", "loads"), ("pickle", "loads"),
}  # fmt: skip


def test_nothing_in_the_packages_can_run_what_it_reads() -> None:
    """No eval, no exec, no pickle, no shell; `re.compile` and `torch.compile` are attributes, not the builtin."""
    files = [p for package in ("daemon/anytimed", "adapters/anytimed_adapters") for p in (ROOT / package).rglob("*.py")]
    assert len(files) > 60
    imports_of_code = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, where
                imports_of_code += [where] if node.func.id == "import_module" else []
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in FORBIDDEN_NAMES, where
            elif isinstance(node, ast.keyword):
                assert node.arg not in ("shell", "trust_remote_code"), where
    assert all("registry.py" in where for where in imports_of_code), imports_of_code
    assert len(imports_of_code) == 1, "the allowlist is asked right before it"


# --- pull -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, str(tmp_path / "published"))


def plant(site: Site, files: dict[str, bytes]) -> str:
    """Publish a checkpoint that is consistent in itself, digests and pointer included, with these files added."""
    item = site.publish(9)
    where = f"checkpoints/{item.id}"
    told = json.loads(item.data)
    for name, data in files.items():
        site.store.replace(f"{where}/{name}", data)
        entry = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        told["files"] = [f for f in told["files"] if f["name"] != name] + [entry]
    manifest = json.dumps(told).encode()
    site.store.replace(f"{where}/manifest.json", manifest)
    pointer = json.loads(site.store.read("latest.json", 1 << 20))
    pointer["manifest_sha256"] = hashlib.sha256(manifest).hexdigest()
    site.store.replace("latest.json", json.dumps(pointer).encode())
    return item.id


HOSTILE_FILES = {
    "a lying header": {"model.safetensors": LYING["overlapping"]},
    "a deep header": {"model.safetensors": LYING["deep"]},
    "an index out of the folder": {
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode()
    },
    "an index of a file that is not there": {
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "b.safetensors"}}).encode()
    },
    "a deep index": {"model.safetensors.index.json": BOMBS["deep lists"]},
    "a deep config": {"config.json": BOMBS["deep objects"]},
    "a config that is a list": {"config.json": b"[]"},
    "a pickle": {"pytorch_model.bin": b"cos\nsystem\n(S'id'\ntR."},
    "a pickle in capitals": {"MODEL.PT": b"cos\nsystem\n(S'id'\ntR."},
}


@pytest.mark.parametrize("hostile", HOSTILE_FILES)
def test_a_consistent_but_hostile_checkpoint_is_not_put_in_place(site: Site, tmp_path: Path, hostile: str) -> None:
    good = site.publish(1)
    bad = plant(site, HOSTILE_FILES[hostile])
    pulled = pull(site.url, tmp_path / "model")
    assert (pulled.manifest, pulled.fell_back) == (good.manifest, True)
    assert not (tmp_path / "model" / "versions" / bad).exists()
    with pytest.raises(CorruptError):
        pull(site.url, tmp_path / "model", checkpoint=bad)


def test_the_planted_checkpoint_without_its_fault_is_pulled(site: Site, tmp_path: Path) -> None:
    site.publish(1)
    ident = plant(site, {"config.json": b'{"model_type": "llama"}'})
    pulled = pull(site.url, tmp_path / "model")
    assert pulled.manifest.id == ident and not pulled.fell_back
    check_folder(pulled.path, [entry.name for entry in pulled.manifest.files])


NO_IDS = [
    "../x", "/etc", "00001-000001-0000000001/../..", "", "latest", "a\0b", "-rf", "best.json",
    "٠٠٠٠١-000001-0000000001", "00001-000001-0000000001\n",
]  # fmt: skip


@pytest.mark.parametrize("ident", NO_IDS)
def test_ids_on_the_command_line(site: Site, tmp_path: Path, ident: str) -> None:
    site.publish(1)
    with pytest.raises(ConfigError, match="is no checkpoint id"):
        pull(site.url, tmp_path / "model", checkpoint=ident)
    assert not (tmp_path / "model").exists()


# --- a spool, a commit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "pytorch_model.bin", "manifest.json"])
def test_a_spooled_export_with_a_hostile_manifest_is_dropped(site: Site, name: str) -> None:
    item = site.spool.build(content(3))
    told = json.loads(item.data)
    told["files"] = [{"name": name, "size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}]
    (item.path / "manifest.json").write_bytes(json.dumps(told).encode())
    again = Spool(site.run)
    assert again.pending() == []
    assert not item.path.exists()
    assert Store(site.url).list() == []


def test_names_in_spool_that_are_none_of_ours_are_left_alone(site: Site) -> None:
    for name in ("00001-000001-0000000001 ", "..x", "latest", "00001-000001-0000000001\n"):
        (site.run.spool / name).mkdir()
    (site.run.spool / "00001-000009-0000000001").symlink_to("/etc")
    assert Spool(site.run).pending() == []
    assert Path("/etc/passwd").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.write_text(folder / "data", 20)
    tiny.run("run", tiny.config(folder), "--steps", "2")
    return folder


FORGED: dict[str, Callable[[Any], Any]] = {
    "a list": lambda state: [],
    "nothing": lambda state: {},
    "another shape": lambda state: {**state, "shape": [1]},
    "no position": lambda state: {**state, "position": {"sources": 7}},
    "a clock": lambda state: {**state, "learner": {**state["learner"], "clocks": {"steps": "x"}}},
    "a hold-out of other lengths": lambda state: {**state, "holdout": [{"source": "main", "digest": "", "length": -5}]},
    "an evaluation": lambda state: {**state, "evaluation": {"loss": "low"}},
    "world size": lambda state: {**state, "world_size": "x"},
    "a bomb": lambda state: BOMBS["deep objects"],
    "the state as it was": lambda state: state,
}


@pytest.mark.parametrize("fault", [*FORGED, "lying tensors"])
def test_a_forged_commit_is_a_named_error(trained: Path, tmp_path: Path, fault: str) -> None:
    """Digests are right: whoever can write a mirror of the commits can do this."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = tiny.config(tmp_path, **{"sources.main": {"url": str(trained / "data" / "*.txt")}})
    commit = tiny.newest_commit(tmp_path)
    if fault == "lying tensors":
        next(commit.glob("rank-*.safetensors")).write_bytes(struct.pack("<Q", 1 << 60))
    else:
        forged = FORGED[fault](json.loads((commit / "state.json").read_text()))
        (commit / "state.json").write_bytes(forged if isinstance(forged, bytes) else json.dumps(forged).encode())
    told = CommitManifest.from_bytes((commit / "MANIFEST.json").read_bytes(), "here").model_dump(mode="json")
    for entry in told["files"]:
        data = (commit / entry["name"]).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (commit / "MANIFEST.json").write_bytes(CommitManifest(**told).to_bytes())
    with RunDirectory(tmp_path / "run") as run:
        run.acquire()
        if fault == "the state as it was":
            assert recover(load(path), run).learner.step_count == 2
            return
        with pytest.raises(AnytimedError) as caught:
            recover(load(path), run)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 3000
