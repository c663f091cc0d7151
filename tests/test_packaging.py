"""What is built and installed is complete: four root folders, one package."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"passes", "codegen", "runtime"}
IMPORT_ALL = """
import importlib, pkgutil, sys, pathlib, moecc
home = pathlib.Path(moecc.__file__).parent
assert home.is_relative_to(sys.argv[1]), home
names = [module.name for module in pkgutil.walk_packages(moecc.__path__, "moecc.")]
for name in names:
    if name != "moecc.__main__":
        importlib.import_module(name)
print(len(names))
"""


def packages_on_disk() -> set[str]:
    found = {"moecc"}
    own = [path for path in (ROOT / "moecc").iterdir() if not path.is_symlink()]
    for folder in (*own, *(ROOT / name for name in FOLDERS)):
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "moecc" else ("moecc", *parts)))
    return found


def settings() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_on_disk_is_listed() -> None:
    assert set(settings()["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_the_links_in_the_package_point_at_the_root_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / "moecc" / folder).resolve() == ROOT / folder


def build(tmp_path: Path, kind: str) -> Path:
    """Build from a copy without git's or a build's leftovers."""
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for file in files:
        if file.startswith(("benchmarks/reference/", "tests/")):
            continue
        target = source / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).is_symlink():
            target.symlink_to((ROOT / file).readlink())
        elif (ROOT / file).is_file():
            target.write_bytes((ROOT / file).read_bytes())
    out = tmp_path / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def install_and_import(archive: Path, tmp_path: Path) -> int:
    """Install into an empty folder and import every module from a foreign directory."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(archive)], check=True, capture_output=True)
    result = subprocess.run(
        [sys.executable, "-S", "-c", IMPORT_ALL, str(site)],
        cwd="/", env={"PYTHONPATH": f"{site}:{_libraries()}", "HOME": str(tmp_path)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(result.stdout)


def _libraries() -> str:
    import torch

    return str(Path(torch.__file__).parent.parent)


def test_a_wheel_holds_every_package_and_template(tmp_path: Path) -> None:
    wheel = build(tmp_path, "wheel")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moecc"}
    for kind in (".cpp", ".css", ".js", ".toml"):
        assert any(name.endswith(kind) for name in names)
    assert install_and_import(wheel, tmp_path) >= len(packages_on_disk())


def test_an_sdist_installs_like_the_wheel(tmp_path: Path) -> None:
    sdist = build(tmp_path, "sdist")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith(".cpp") for name in archive.getnames())
    assert install_and_import(sdist, tmp_path) >= len(packages_on_disk())


@pytest.mark.parametrize("folder", sorted(FOLDERS | {"moecc"}))
def test_no_file_is_two_ideas(folder: str) -> None:
    sources = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.[ch]*")]
    long = {file.name: n for file in sources if (n := len(file.read_text().splitlines())) > 400}
    assert not long
