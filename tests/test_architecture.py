"""The rules of the house, as tests: layers, DVC deps, params, options, the file tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from dvc_render import VegaRenderer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import BaseModel
from ruamel.yaml import YAML

import sda_core.params as params_module
from sda_core import sources
from sda_core.params import Section

ROOT = Path(__file__).resolve().parents[1]
# No stage depends on these; each has its reason in sda_core/sources.py, and tests below check that none of them computes.
KERNEL = {
    "sda_core",
    *(f"sda_core.{name}" for name in ("_peft_hook", "artifacts", "costs", "errors", "log", "params")),
    *(f"sda_core.cli{name}" for name in ("", ".process", ".project", ".stage")),
    "stages",
}

# Who may import whom: a package may import those of a higher number only (and itself).
LEVELS = {
    "stages": 0,
    "cli": 0.3,  # what stages share, and the commands that read what stages wrote
    "steps": 0.4,  # the longer stages' bodies
    "explore": 0.45,  # asks whatever a finished run has
    "item_source": 0.5,  # prompts of data, shown by items
    "verification": 0.5,  # sees every artifact, so it may ask whoever reads one
    "ranking": 0.7,  # asks trained recommenders; no training asks it
    "alignment": 1, "index": 1, "recommenders": 1, "report": 1, "data": 1, "diagnostics": 1, "exchange": 1,
    "evaluation": 1.5, "embeddings": 1.5,  # the report takes comparisons from one and fuses with the other
    "fetch": 0.9,  # asks data what a file is, and for the built-in shop
    "backbones": 2, "adapters": 2, "losses": 2, "items": 2,
    "image_store": 3, "local_files": 3, "processes": 3, "item_vectors": 3, "dropped_values": 3,
    "artifacts": 4, "traits": 4, "variants": 4,
    "modalities": 5, "read_ahead": 5, "principal_axes": 5, "unit_rows": 5,
    "sources": 5, "params": 5, "log": 5, "seed": 5, "fingerprint": 5, "checkpoint": 3, "runtime": 3, "costs": 5, "_peft_hook": 5,
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
        "explore",
        "losses",
        "processes",
        "ranking",
        "recommenders",
        "runtime",
    },
    "transformers": {"backbones"},
    "peft": {"adapters"},
    "faiss": {"index"},
    "typer": {"stages", "cli"},
    "dvc": {"cli"},
    "streamlit": {"explore"},
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
    """What importing a package runs, without the imports inside its functions and those for type checkers alone."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= named(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)  # a try, a with, the body of a class
    return frozenset(found)


def named(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules that an import statement asks for; a package is asked for where something in its ``__init__`` is."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert node.module is not None
    found = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in modules() else str(node.module) for name in found}


@cache
def all_imports(path: Path) -> frozenset[str]:
    """The modules that a file asks for anywhere, in its functions too; not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in skipped)
    return frozenset(name for node in nodes for name in named(node))


def dependencies(name: str) -> set[str]:
    """The modules that have to be there before one does all that it says: those it imports anywhere, its functions included.

    Packages on the way to them count, since their ``__init__`` runs first; those that the module itself stands in do not.
    """
    asked = {found for found in all_imports(modules()[name]) if found in modules()}
    parents = {".".join(found.split(".")[:depth]) for found in asked for depth in range(1, found.count(".") + 1)}
    return asked | {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}


def a_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_import_goes_in_a_circle() -> None:
    """A package's ``__init__`` may import its modules, at the top or in a function; they do not import it back.

    What several modules of a package need stands in one of them (``base.py``), and the ``__init__`` shows it to others.
    """
    graph = {name: dependencies(name) - {name} for name in modules()}
    assert a_cycle(graph) is None
    graph["sda_core.errors"] = {"sda_core.losses"}
    assert a_cycle(graph) is not None


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
    others = {name for name in imports(path) if name.split(".")[0] == "stages"}
    assert not others, f"{path}: stages are copied into a user's project, and import sda_core only (got {sorted(others)})"


@pytest.mark.parametrize("path", sorted(ROOT.glob("stages/*.py")), ids=lambda p: p.name)
def test_a_stage_is_four_verbs(path: Path) -> None:
    """It loads, reads, calls, writes: short, without loops, arithmetic (paths and unions apart) and choices by name."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    body = [statement for statement in ast.parse(text).body if isinstance(statement, ast.FunctionDef)]
    nodes = [node for function in body for node in ast.walk(function)]
    assert len(body) == (path.name != "__init__.py"), f"{path}: one function, the stage's"
    assert {type(node.op) for node in nodes if isinstance(node, ast.BinOp)} <= {ast.Div, ast.BitOr}
    loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
    assert not [node.lineno for node in nodes if isinstance(node, loops)], f"{path}: a loop belongs into sda_core"
    for node in nodes:
        if isinstance(node, ast.If):
            assert not any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node.test)), path


def test_library_is_light_without_torch() -> None:
    script = (
        "import sys, sda_core, sda_core.data, sda_core.fetch.images, sda_core.evaluation, sda_core.artifacts,"
        "sda_core.params, sda_core.cli.app, sda_core.processes, sda_core.embeddings.table;"
        "print(sorted({'torch', 'transformers', 'peft', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ DVC deps
def pipeline() -> dict[str, dict]:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


def needed_modules(entry: str) -> set[str]:
    """All modules of this project that a stage's module imports, directly or not, without the kernel.

    Of a package that is asked for, the imports inside the functions of its ``__init__`` count too; of one that is merely on the
    way to a module, what its import runs.
    """
    todo: list[tuple[str, bool]] = [(entry, True)]
    seen: set[tuple[str, bool]] = set()
    while todo:
        name, is_asked_for = todo.pop()
        if (name, is_asked_for) in seen or name in KERNEL or name not in modules():
            continue
        seen.add((name, is_asked_for))
        path = modules()[name]
        todo += [(found, True) for found in (all_imports if is_asked_for else top_level_imports)(path)]
        todo += [(".".join(name.split(".")[:depth]), False) for depth in range(1, name.count(".") + 1)]
    return {name for name, _ in seen}


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


def covering(stage: dict) -> list[Path]:
    """The code and data of this repository that a stage lists."""
    return [ROOT / dep for dep in stage["deps"] if dep.startswith(("sda_core", "stages"))]


@pytest.mark.parametrize("stage_name", sorted(pipeline()))
def test_deps_list_the_data_files_of_the_packages(stage_name: str) -> None:
    """Templates, style sheets and weights are read, not imported: a stage that uses their package depends on them as well."""
    stage = pipeline()[stage_name]
    entry = re.search(r"-m (stages\.\w+)", stage["cmd"])
    assert entry is not None
    used = {modules()[name].parent for name in needed_modules(entry[1]) if name.startswith("sda_core.")} - {ROOT / "sda_core"}
    data = [path for path in (ROOT / "sda_core").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc", ".md"}]
    assert {"template.html.j2", "style.css", "model.safetensors"} <= {path.name for path in data}
    for path in data:
        package = next(folder for folder in path.parents if (folder / "__init__.py").is_file())
        if package in used:
            assert any(dep in path.parents or dep == path for dep in covering(stage)), f"dvc.yaml: {stage_name}: deps miss {path}"


def test_the_walk_over_imports_sees_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports in functions, in a try, in a class, re-exports and packages on the way; not those for type checkers alone."""
    files = {
        "stages/__init__.py": "",
        "stages/entry.py": "from sda_core import package\ndef run():\n    from sda_core.lazy import thing\n",
        "sda_core/__init__.py": "",
        "sda_core/lazy.py": "try:\n    import sda_core.tried\nexcept ImportError:\n    pass\n",
        "sda_core/tried.py": (
            "import typing\nif typing.TYPE_CHECKING:\n    from sda_core import typed\nelse:\n    import sda_core.fallback\n"
        ),
        "sda_core/typed.py": "",
        "sda_core/fallback.py": "from sda_core.other.inner import name\n",
        "sda_core/package/__init__.py": (
            "from sda_core.package.part import name\ndef build():\n    from sda_core.package import late\n"
        ),
        "sda_core/package/part.py": "class C:\n    from sda_core import in_class\n",
        "sda_core/package/late.py": "",
        "sda_core/in_class.py": "",
        "sda_core/other/__init__.py": "from sda_core.other.shown import x\ndef build():\n    from sda_core.other import unused\n",
        "sda_core/other/shown.py": "",
        "sda_core/other/inner.py": "",
        "sda_core/other/unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    by_name = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tmp_path / name for name in files}
    monkeypatch.setattr(sys.modules[__name__], "modules", lambda: by_name)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    sources._file.cache_clear()
    expected = {"entry", "lazy", "tried", "fallback", "package", "part", "in_class", "other", "shown", "inner"}
    assert {name.rpartition(".")[2] for name in needed_modules("stages.entry")} == expected | {"late"}
    # what a training is made of is told by the recommender's own file, so a package's choices are left out there
    assert {name for name, path in by_name.items() if path in sources.sources_of("stages.entry")} == {
        name for name in by_name if name.rpartition(".")[2] in expected
    }
    with pytest.raises(ModuleNotFoundError):
        sources.sources_of("stages.nobody")
    monkeypatch.undo()
    sources._file.cache_clear()


@pytest.mark.parametrize("kind", ["pop", "bpr", "vbpr", "slmrec", "sasrec", "bert4rec"])
def test_what_a_training_is_made_of_is_what_it_imports(kind: str) -> None:
    """Against what a fresh interpreter has loaded once the recommender's module and the stage are imported."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in sources.sources_of("sda_core.steps.train_recommender", f"sda_core.recommenders.{kind}")
    }
    script = (
        f"import sys, sda_core.steps.train_recommender, sda_core.recommenders.{kind}, sda_core.runtime,"
        "sda_core.recommenders.history;"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('sda_core', 'stages')), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(line).relative_to(ROOT).as_posix() for line in done.stdout.splitlines()}
    assert found == loaded - {modules()[name].relative_to(ROOT).as_posix() for name in KERNEL}
    deps = [dep.relative_to(ROOT).as_posix() for dep in covering(pipeline()["train_recommender"])]
    assert all(any(file == dep or file.startswith(dep + "/") for dep in deps) for file in found)
    assert not [file for file in found if "ranking" in file or "report" in file or "evaluation" in file]


# ------------------------------------------------------------------------------------- the kernel does not compute
def test_the_exempt_modules_are_named_with_a_reason() -> None:
    assert set(sources.EXEMPT) == KERNEL
    assert all(sources.EXEMPT.values())


@pytest.mark.parametrize("name", sorted(KERNEL))
def test_an_exempt_module_does_not_compute(name: str) -> None:
    """No stage depends on it, so nothing in it may change a result."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    libraries = {found.split(".")[0] for found in imports(modules()[name])}
    assert not libraries & {"numpy", "torch", "random", "scipy", "sklearn", "faiss", "PIL", "transformers"}
    assert ("polars" in libraries) <= (name == "sda_core.artifacts")
    is_package = modules()[name].name == "__init__.py"  # of which stages run what its import runs: cli.main is none of it
    inside = {found for found in (top_level_imports if is_package else all_imports)(modules()[name]) if found in modules()}
    assert inside <= KERNEL, f"{name} imports {inside - KERNEL}, which no stage would list"
    if name not in {"sda_core.costs", "sda_core.params"}:  # whose numbers stand in no output, and are compared only
        operators = {type(node.op) for node in ast.walk(tree) if isinstance(node, ast.BinOp)}
        assert operators <= {ast.Add, ast.Div, ast.BitOr, ast.Mod, ast.BitAnd, ast.Sub}, f"{name} calculates"


def test_artifacts_reads_and_writes_tables_as_they_are() -> None:
    tree = ast.parse(modules()["sda_core.artifacts"].read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pl"}
    types = {"DataType", "Int32", "Int64", "Float32", "Float64", "String", "List", "Boolean", "Binary", "Array"}
    assert used <= types | {"DataFrame", "LazyFrame", "exceptions", "len", "scan_parquet", "read_parquet_metadata"}
    operators = {type(node.op) for node in ast.walk(tree) if isinstance(node, ast.BinOp)}
    assert operators <= {ast.Add, ast.Div, ast.BitOr}  # texts and lists, paths, types


def test_params_declare_and_check_and_do_nothing_else() -> None:
    """Only validators, which give back what they were given, and ``of``, which looks a section up."""
    tree = ast.parse(modules()["sda_core.params"].read_text(encoding="utf-8"))
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for method in (node for node in section.body if isinstance(node, ast.FunctionDef)):
            returned = {ast.unparse(node.value) for node in ast.walk(method) if isinstance(node, ast.Return) and node.value}
            is_validator = any("validator" in ast.unparse(decorator) for decorator in method.decorator_list)
            where = f"params.py: {section.name}.{method.name}"
            assert method.name == "of" or returned <= ({"self"} if is_validator else {"None"}), where
    params = params_module.parse_params(YAML(typ="safe").load(composed("ladder=full")), "preset")
    for name in ("pop", "bpr", "vbpr", "slmrec", "sasrec", "bert4rec"):
        assert params.train_recommender.of(name) is getattr(params.train_recommender, name)
    for name, chosen in params.train_adapter.variants.items():
        adapter, loss = params.train_adapter.of(name)
        assert adapter is getattr(params.train_adapter, chosen.adapter)
        assert loss is getattr(params.train_adapter, chosen.loss)


@pytest.mark.parametrize("stage_name", sorted(pipeline()))
def test_params_used_by_a_stage_are_tracked(stage_name: str) -> None:
    """`params.<section>` in the file of a stage or of its step must stand among the stage's params; runtime changes no result."""
    stage = pipeline()[stage_name]
    entry = re.search(r"-m (stages\.\w+)", stage["cmd"])
    assert entry is not None
    files = [modules()[name] for name in (entry[1], entry[1].replace("stages", "sda_core.steps")) if name in modules()]
    texts = "".join(path.read_text(encoding="utf-8") for path in files)
    used = set(re.findall(r"\bparams\.(\w+)", texts)) & set(params_module.Params.model_fields)
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


def same_order(data: dict, section: BaseModel, where: str = "params.yaml") -> None:
    """The keys of a file against the fields of what was read from it, section by section."""
    assert list(data) == list(type(section).model_fields), where
    for key, value in data.items():
        inside = getattr(section, key)
        if isinstance(inside, BaseModel):
            same_order(value, inside, f"{where}: {key}")
        elif isinstance(inside, dict):
            for name, entry in inside.items():
                same_order(value[name], entry, f"{where}: {key}.{name}")


def test_params_yaml_has_the_order_of_the_model() -> None:
    path = ROOT / "params.yaml"
    data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    same_order(data, params_module.load_params(path))
    swapped = dict(reversed(data.items()))
    with pytest.raises(AssertionError):
        same_order(swapped, params_module.parse_params(swapped, "swapped"))


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
    from sda_core.cli.app import STAGES, stage_command

    for name in STAGES:
        allowed = {"variant", "recommender", "params", "root"} | {"download": {"check"}, "report": {"costs", "experiments"}}.get(
            name, set()
        )
        assert set(stage_command(name).__annotations__) - {"return"} <= allowed, name


# --------------------------------------------------------------------------------------------- repository
def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no Git checkout here: the tracked files are not known")
    return done.stdout.split("\n")[:-1]


def test_the_tree_is_true() -> None:
    text = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n+```text\n(.+?)\n```", text, re.S)
    assert block is not None
    named = set()
    stack: list[str] = []
    for line in block[1].splitlines():
        entry = line.split("  #")[0].rstrip()
        depth = (len(entry) - len(entry.lstrip())) // 2
        stack = [*stack[:depth], entry.strip().rstrip("/")]
        path = "/".join(stack)
        assert (ROOT / path).exists(), f"docs/tree.md names {path}, which does not exist"
        named.add(path)
    for path in python_files():
        relative = path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py":
            covered = any(
                relative == name or relative.startswith(name + "/") for name in named if name not in {"sda_core", "stages"}
            )
            assert covered, f"docs/tree.md misses {relative}"


@pytest.mark.parametrize("guide", ["CONTRIBUTING.md", "docs/extending.md"])
def test_the_files_that_a_guide_names_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:sda_core|stages|tests|conf|docs|experiments)/[\w./]*\w)/?`", text))
    invented = {"sda_core/template"} | {name for name in named if Path(name).stem == "mine"}
    assert len(named - invented) > 8
    assert not {name for name in named - invented if not (ROOT / name).exists()}


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
