"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "pyarrow", "numpy", "transformers", "triton", "huggingface_hub", "matplotlib")


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    package = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_kernels_know_nothing_of_the_encoder() -> None:
    for path in files("kernels"):
        assert not {name for name in imports_of(path) if name.split(".")[0] == "nomoe"}, path


def test_kernels_folder_is_no_package() -> None:
    # it would shadow Hugging Face's `kernels` and break `import transformers`
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_few_know_the_kernel_modules() -> None:
    for path in files("nomoe"):
        users = {name for name in imports_of(path) if name.split(".")[0] == "nomoe_kernels"}
        assert not users or path.name in ("backends.py", "packable.py", "moe.py"), (path, users)


@pytest.mark.parametrize(
    ("module", "may_not_import"),
    [
        ("config", ["model", "moe", "encoder", "checkpoint", "tokenizer"]),
        ("checkpoint", ["model", "moe", "encoder", "tokenizer"]),
        ("tokenizer", ["model", "moe", "encoder", "checkpoint"]),
        ("backends", ["packable", "moe", "model", "encoder", "checkpoint", "tokenizer"]),
        ("packable", ["moe", "model", "encoder", "checkpoint", "tokenizer"]),
        ("moe", ["model", "encoder", "checkpoint", "tokenizer"]),
        ("model", ["encoder", "tokenizer", "pipeline"]),
        ("pipeline", ["encoder", "checkpoint"]),
    ],
)
def test_direction_inside(module: str, may_not_import: list[str]) -> None:
    names = imports_of(ROOT / "nomoe" / f"{module}.py")
    assert not {f"nomoe.{other}" for other in may_not_import} & names


def test_core_imports_only_core_dependencies() -> None:
    allowed = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "tqdm"}
    allowed |= set(sys.stdlib_module_names) | {"nomoe", "nomoe_kernels"}
    # the reference code needs transformers, the heat map matplotlib, corpora pyarrow and Ray; all
    # only where they are used
    extras = {
        "reference_hf.py": {"transformers"},
        "routes.py": {"matplotlib"},
        "batches.py": {"pyarrow"},
        "dataset.py": {"ray"},
        "manifest.py": {"pyarrow", "filelock"},
        **{
            name: {"pyarrow"}
            for name in ("sources.py", "rows.py", "plan.py", "types.py", "outputs.py", "workers.py")
        },
    }
    # each of these is named after what it brings
    inside = {
        "transformers.py": {"transformers"},
        "sentence_transformers.py": {"sentence_transformers"},
        "mteb.py": {"mteb"},
        "langchain.py": {"langchain_core"},
        "llama_index.py": {"llama_index"},
    }
    for path in files("nomoe"):
        tops = {name.split(".")[0] for name in imports_of(path)}
        extra = inside if path.parent.name == "integrations" else extras
        assert tops <= allowed | extra.get(path.name, set()), path


def test_core_never_imports_the_integrations() -> None:
    for path in files("nomoe"):
        # nomoe/__init__.py names them for type checkers, and imports them when they are used
        if path.parent.name != "integrations" and path != ROOT / "nomoe" / "__init__.py":
            assert not [name for name in imports_of(path) if "integrations" in name], path


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


@pytest.mark.parametrize("code", ["import nomoe", "import nomoe.cli; nomoe.cli._parser()"])
def test_importing_is_light(code: str) -> None:
    loaded = run(
        f"import sys; sys.path[:0] = ['.', 'kernels']; {code}; print(*sys.modules)"
    ).split()
    assert not set(HEAVY) & set(loaded)


def test_works_without_triton(tiny_folder: Path) -> None:
    code = (
        "import sys; sys.path[:0] = ['.', 'kernels']; sys.modules['triton'] = None; "
        "import nomoe; from nomoe.synthetic import write_checkpoint; "
        f"encoder = nomoe.Encoder.from_pretrained({str(tiny_folder)!r}, device='cpu').warmup(); "
        "print(encoder.backend, encoder.encode_query('a').shape, encoder.route('a').counts.sum())"
    )
    assert run(code).split() == ["torch", "(96,)", "36"]


def test_public_names_resolve() -> None:
    import nomoe

    for name in nomoe.__all__:
        # what needs an extra that the tests need not have
        if name != "mteb_model":
            assert getattr(nomoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Decoder'"):
        nomoe.Decoder  # noqa: B018


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("register", "transformers", "transformers"),
        ("unregister", "transformers", "transformers"),
        ("sentence_transformer", "sentence_transformers", "sentence-transformers"),
        ("mteb_model", "mteb", "mteb"),
    ],
)
def test_what_is_not_installed_is_named(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nomoe

    monkeypatch.setitem(sys.modules, package, None)
    message = rf"nomoe\.{name} needs {package}, .*pip install 'nomoe\[{extra}\]'"
    with pytest.raises(ImportError, match=message):
        getattr(nomoe, name)
    assert name not in dir(nomoe)
    assert "Encoder" in dir(nomoe)
    # which asks for every name of dir()
    inspect.getmembers(nomoe)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n{extra} = [" in pyproject


def test_cli_default_repo_is_the_checkpoint_modules() -> None:
    from nomoe import checkpoint, cli, corpus

    assert cli._DEFAULT_REPO == checkpoint.DEFAULT_REPO
    assert cli._PRECISIONS == corpus.PRECISIONS


def test_pinned_revision_is_the_published_one() -> None:
    from nomoe import checkpoint, data

    published = data.published()["checkpoint"]
    assert (published["repo"], published["revision"]) == (
        checkpoint.DEFAULT_REPO,
        checkpoint.DEFAULT_REVISION,
    )
