"""The rules of the house, as tests: layers, DVC deps, params, options, README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from dvc_render import VegaRenderer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import BaseModel
from ruamel.yaml import YAML

import sda_core.params as params_module
from sda_core.params import Section

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {
    "sda_core",
    *(
        f"sda_core.{name}"
        for name in (
            "_peft_hook",
            "errors",
            "params",
            "artifacts",
            "log",
            "seed",
            "fingerprint",
            "checkpoint",
            "runtime",
            "costs",
        )
    ),
    "stages",
    "stages._stage",
}

# Who may import whom: a package may import those of a higher number only (and itself).
LEVELS = {
    "stages": 0,
    "verification": 0.5,  # sees every artifact, so it may ask whoever reads one
    "alignment": 1, "embeddings": 1, "index": 1, "recommenders": 1, "evaluation": 1, "report": 1, "data": 1,
    "diagnostics": 1, "exchange": 1,
    "backbones": 2, "adapters": 2, "losses": 2, "items": 2,
    "image_store": 3, "processes": 3,
    "artifacts": 4,
    "params": 5, "log": 5, "seed": 5, "fingerprint": 5, "checkpoint": 3, "runtime": 3, "costs": 5, "_peft_hook": 5,
    "errors": 6,
}  # fmt: skip

ONLY_IN = {
    "torch": {
        "adapters",
        "alignment",
        "backbones",
        "checkpoint",
        "diagnostics",
        "embeddings",
        "losses",
        "processes",
        "recommenders",
        "runtime",
    },
    "transformers": {"backbones"},
    "peft": {"adapters"},
    "faiss": {"index"},
    "typer": {"stages"},
    "dvc": {"stages"},
}


def python_files() -> list[Path]:
    return sorted([*ROOT.glob("sda_core/**/*.py"), *ROOT.glob("stages/**/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in python_files()}


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, nested imports included; type-checking-only ones are not."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            skipped.update(child for statement in node.body for child in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def room(name: str) -> str:
    """The room of the house a module stands in."""
    parts = name.split(".")
    return "stages" if parts[0] == "stages" else (parts[1] if len(parts) > 1 else "")


@cache
def top_level_imports(path: Path) -> frozenset[str]:
    """What importing a package runs, without the imports inside its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def test_every_room_has_a_level() -> None:
    assert {room(name) for name in modules()} - {""} <= set(LEVELS)


@pytest.mark.parametrize("path", python_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_layers(path: Path) -> None:
    here = room(module_name(path))
    for name in imports(path):
        top = name.split(".")[0]
        if top in {"sda_core", "stages"} and here and (there := room(name)) in LEVELS and there != here:
            assert LEVELS[there] > LEVELS[here], f"{path} ({here}) may not import {name}"
        if top in ONLY_IN:
            assert here in ONLY_IN[top], f"{path}: {top} may be imported in {sorted(ONLY_IN[top])} only"
    if here == "stages" and path.name not in {"cli.py", "__init__.py"} and not path.name.startswith("_"):
        others = {name for name in imports(path) if name.startswith("stages.") and not name.startswith("stages._")}
        assert not others, f"a stage imports a stage: {others}"


def test_library_is_light_without_torch() -> None:
    script = (
        "import sys, sda_core, sda_core.data, sda_core.evaluation, sda_core.artifacts, sda_core.params, stages.cli,"
        "sda_core.processes, sda_core.embeddings.table;"
        "print(sorted({'torch', 'transformers', 'peft', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ DVC deps
def pipeline() -> dict[str, dict]:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


def resolve(name: str) -> str | None:
    """The module behind an imported name: `from a.b import c` may name a module or something in one."""
    while name:
        if name in modules():
            return name
        name = name.rpartition(".")[0]
    return None


def needed_modules(entry: str) -> set[str]:
    """All modules of this project that a stage's module imports, directly or not, without the kernel."""
    todo, seen = [entry], set()
    while todo:
        name = todo.pop()
        if name in seen or name in KERNEL:
            continue
        seen.add(name)
        # importing a.b.c runs the top level of a/__init__ and a/b/__init__ as well
        parents = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
        runs = top_level_imports if modules()[name].name == "__init__.py" else imports
        todo += [n for n in (*parents, *(resolve(i) for i in runs(modules()[name]))) if n in modules()]
    return seen


@pytest.mark.parametrize("stage_name", sorted(pipeline()))
def test_deps_list_every_module(stage_name: str) -> None:
    stage = pipeline()[stage_name]
    entry = re.search(r"-m (stages\.\w+)", stage["cmd"])
    assert entry is not None
    deps = [ROOT / dep for dep in stage["deps"] if "$" not in dep]
    missing = []
    for name in needed_modules(entry[1]):
        path = modules()[name]
        if not any(path == dep or dep in path.parents for dep in deps):
            missing.append(path.relative_to(ROOT).as_posix())
    assert not missing, f"dvc.yaml: {stage_name}: deps miss {sorted(missing)}"


@pytest.mark.parametrize("stage_name", sorted(pipeline()))
def test_code_deps_exist_and_are_needed(stage_name: str) -> None:
    stage = pipeline()[stage_name]
    entry = re.search(r"-m (stages\.\w+)", stage["cmd"])
    assert entry is not None
    needed = {modules()[name] for name in needed_modules(entry[1])}
    for dep in (ROOT / dep for dep in stage["deps"] if dep.startswith(("sda_core", "stages"))):
        assert dep.exists(), f"dvc.yaml: {stage_name}: {dep} does not exist"
        assert any(path == dep or dep in path.parents for path in needed), f"dvc.yaml: {stage_name} does not import {dep}"


@pytest.mark.parametrize("stage_name", sorted(pipeline()))
def test_params_used_by_a_stage_are_tracked(stage_name: str) -> None:
    """`run.params.<section>` in a stage's file must stand among the stage's params (runtime must not change a result)."""
    stage = pipeline()[stage_name]
    entry = re.search(r"-m (stages\.\w+)", stage["cmd"])
    assert entry is not None
    used = set(re.findall(r"run\.params\.(\w+)", modules()[entry[1]].read_text(encoding="utf-8"))) & set(
        params_module.Params.model_fields
    )
    used -= {"runtime"}
    tracked = {str(param).split(".")[0] for param in stage["params"]}
    assert used <= tracked, f"dvc.yaml: {stage_name}: params miss {sorted(used - tracked)}"


def test_plots_leave_out_what_was_not_measured() -> None:
    """An epoch between two validations has an empty field, which Vega draws as 0 unless the template filters it."""
    plots = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    templates = {plot["template"] for entry in plots for plot in entry.values()}
    assert templates == {"curves"}
    rows = [{"epoch": epoch, "valid_ndcg_10": value, "rev": "HEAD", "filename": "sda"} for epoch, value in ((1, ""), (2, "0.1"))]
    renderer = VegaRenderer(
        rows, "curves", template="curves", template_dir=str(ROOT / ".dvc" / "plots"), x="epoch", y="valid_ndcg_10"
    )
    filled = renderer.get_filled_template()
    assert filled["encoding"]["y"]["field"] == "valid_ndcg_10"
    assert filled["encoding"]["color"]["field"] == "filename"
    assert filled["transform"] == [{"filter": "isValid(datum['valid_ndcg_10']) && datum['valid_ndcg_10'] !== ''"}]


# -------------------------------------------------------------------------------------------------- params
def sections() -> list[type[BaseModel]]:
    found = [value for value in vars(params_module).values() if isinstance(value, type) and issubclass(value, Section)]
    assert len(found) > 15
    return found


@pytest.mark.parametrize("section", sections(), ids=lambda s: s.__name__)
def test_params_have_no_defaults_and_are_strict(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        assert field.is_required(), f"{section.__name__}.{name} has a default; DVC does not see defaults"
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"]
    assert section.model_config["strict"]


def composed(*overrides: str) -> str:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", overrides=list(overrides))
    OmegaConf.resolve(config)
    return OmegaConf.to_yaml(config)


def test_params_yaml_is_what_hydra_composes() -> None:
    """`dvc exp run` without -S must not change params.yaml."""
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == composed()


def test_params_yaml_has_the_order_of_the_model() -> None:
    keys = list(YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    assert set(keys) == set(params_module.Params.model_fields)


@pytest.mark.parametrize("dataset", sorted(p.stem for p in (ROOT / "conf" / "dataset").glob("*.yaml")))
@pytest.mark.parametrize("backbone", sorted(p.stem for p in (ROOT / "conf" / "backbone").glob("*.yaml")))
def test_every_preset_is_valid(dataset: str, backbone: str) -> None:
    data = YAML(typ="safe").load(composed(f"dataset={dataset}", f"backbone={backbone}"))
    params_module.parse_params(data, "preset")


@pytest.mark.parametrize("recommender", sorted(p.stem for p in (ROOT / "conf" / "recommender").glob("*.yaml")))
def test_every_recommender_preset_is_valid(recommender: str) -> None:
    params_module.parse_params(YAML(typ="safe").load(composed(f"recommender={recommender}")), "preset")


def test_the_full_ladder_is_valid() -> None:
    params = params_module.parse_params(YAML(typ="safe").load(composed("ladder=full")), "preset")
    assert set(params.variants) == {"id", *params.train_recommender.variants}


def test_the_ladder_without_adapters_is_valid() -> None:
    params = params_module.parse_params(YAML(typ="safe").load(composed("ladder=zero_shot")), "preset")
    assert params.variants == ("id", "zero_shot")
    assert params.train_recommender.variants == ("zero_shot",)
    assert not params.train_adapter.variants


def test_the_guide_s_retrieval_is_valid() -> None:
    """`-S` with a whole section in braces, as docs/scale.md has it."""
    command = re.search(r"-S '(evaluate\.retrieval=\{.+?\})'", (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"))
    assert command is not None
    params = params_module.parse_params(YAML(typ="safe").load(composed(command[1])), "preset")
    assert params.evaluate.retrieval is not None
    assert params.evaluate.retrieval.factory == "HNSW32"


def test_stages_have_four_options_only() -> None:
    """Anything else belongs in params.yaml."""
    from stages.cli import STAGES

    for name, command in STAGES.items():
        allowed = {"variant", "recommender", "params", "root"} | {"download": {"check"}, "report": {"costs"}}.get(name, set())
        assert set(command.__annotations__) - {"return"} <= allowed, name


# --------------------------------------------------------------------------------------------- repository
def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no Git checkout here: the tracked files are not known")
    return done.stdout.split("\n")[:-1]


def test_readme_tree_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n+```text\n(.+?)\n```", text, re.S)
    assert block is not None
    named = set()
    stack: list[str] = []
    for line in block[1].splitlines():
        entry = line.split("  #")[0].rstrip()
        depth = (len(entry) - len(entry.lstrip())) // 2
        stack = [*stack[:depth], entry.strip().rstrip("/")]
        path = "/".join(stack)
        assert (ROOT / path).exists(), f"README's tree names {path}, which does not exist"
        named.add(path)
    for path in python_files():
        relative = path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py":
            covered = any(
                relative == name or relative.startswith(name + "/") for name in named if name not in {"sda_core", "stages"}
            )
            assert covered, f"README's tree misses {relative}"


def test_no_tracked_file_names_a_machine_or_unpickles() -> None:
    path_pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(work|farm|root|home/[a-z]+)/")
    code_pattern = re.compile(r"pickle\.load|[^a-z_.]eval\(|trust_remote_code=True|except Exception|except:")
    for name in tracked():
        if name.endswith((".py", ".md", ".yaml", ".toml", ".txt", ".j2", ".lock")) or name == ".ci/run":
            text = (ROOT / name).read_text(encoding="utf-8")
            if name != "tests/test_architecture.py":
                assert not path_pattern.search(text), f"{name} names a path of a machine"
                if name.endswith(".py"):
                    assert not code_pattern.search(text), f"{name} uses a construct that this project does without"


def test_constraints_are_plain_versions() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+|", line), line
