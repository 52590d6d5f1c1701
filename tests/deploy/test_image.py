"""The image builds without a Docker daemon, and what is in it serves as user 65532 on a root that cannot be written.

A base is made by mmdebstrap, so that nothing but Debian's archive is asked; buildah builds with chroot isolation. The
container's root is then mounted read-only, and entered with chroot, setpriv (no capabilities, no new privileges) and
an empty environment but for the image's own. pip's settings of this host come as a secret and as read-only volumes.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.conftest import require

pytestmark = pytest.mark.deploy

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / "build" / "deploy"
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
BASE = "localhost/adapterd-base:test"
IMAGE = "localhost/adapterd:test"
CERTIFICATES = "/etc/ssl/certs"
START_SECONDS = 600
"""Only a daemon that hangs takes so long, even on a machine that does much else."""


def run(*command: str, **options: Any) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options)
    return done.stdout.strip()


def base_image() -> str:
    """A minimal Debian with Python; kept from one run to the next."""
    if run("buildah", "images", "--quiet", "--noheading", "--filter", f"reference={BASE}"):
        return BASE
    tar = CACHE / "base.tar"
    if not tar.exists():
        partial = tar.with_suffix(".partial.tar")
        run("mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(partial))
        partial.rename(tar)
    container = run("buildah", "from", "scratch")
    run("buildah", "add", "--quiet", container, str(tar), "/")
    run("buildah", "commit", "--quiet", container, BASE)
    run("buildah", "rm", container)
    return BASE


def pip_sources() -> dict[str, str]:
    """Where this host's pip looks for packages, by the name of the setting."""
    listed = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = (line.partition("=") for line in listed)
    settings = {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in pairs}
    wanted = ("extra-index-url", "find-links", "index-url", "trusted-host")
    return {key: settings[key] for key in wanted if key in settings}


def pip_settings() -> str:
    """The same as one file, without what names a file that the build will not have."""
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in pip_sources().items())


def host_volumes() -> list[str]:
    """Folders of this host that the build reads: pip's own, and the certificates of this host's network."""
    sources = pip_sources()
    indexes = " ".join(sources.get(key, "") for key in ("index-url", "extra-index-url")).split()
    # A local index links to files that lie beside it.
    places = [Path(index.removeprefix("file://")).parent for index in indexes if index.startswith("file://")]
    places += [Path(link) for link in sources.get("find-links", "").split()]
    return [str(place) for place in (*places, Path(CERTIFICATES)) if place.is_absolute() and place.exists()]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    require("buildah", "mmdebstrap")
    CACHE.mkdir(parents=True, exist_ok=True)
    secret = tmp_path_factory.mktemp("pip") / "pip.conf"
    secret.write_text(pip_settings())
    volumes = [flag for path in host_volumes() for flag in ("--volume", f"{path}:{path}:ro")]
    command = ["buildah", "build", "--isolation", "chroot", "--network", "host", "--layers", *volumes]
    command += ["--secret", f"id=pip-config,src={secret}", "--tag", IMAGE, "--file", "deploy/Dockerfile"]
    command += ["--build-arg", f"BASE_IMAGE={base_image()}", "--build-arg", "TORCH_INDEX_URL="]
    command += ["--ignorefile", "deploy/Dockerfile.dockerignore", "."]
    began = time.monotonic()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    print(f"built in {time.monotonic() - began:.0f} s")
    return IMAGE


@pytest.fixture(scope="module")
def root(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image's file system, mounted read-only but for /tmp."""
    container = run("buildah", "from", image)
    mounted = Path(run("buildah", "mount", container))
    place = tmp_path_factory.mktemp("root")
    run("mount", "--bind", str(mounted), str(place))
    run("mount", "-o", "remount,bind,ro", str(place))
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(place / "tmp"))
    run("mount", "-t", "proc", "proc", str(place / "proc"))
    for folder in ("dev", "sys"):
        run("mount", "--rbind", "--make-rslave", f"/{folder}", str(place / folder))
    try:
        yield place
    finally:
        run("umount", "--recursive", str(place))
        run("buildah", "rm", container)


def configuration(image: str) -> dict[str, Any]:
    inspected = json.loads(run("buildah", "inspect", "--type", "image", image))
    config: dict[str, Any] = inspected["OCIv1"]["config"]
    return config


def inside(root: Path, image: str, *command: str) -> list[str]:
    """A command that runs as the image says, closed in as far as a restricted pod."""
    config = configuration(image)
    user, group = config["User"].split(":")
    privileges = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
    privileges += ["--bounding-set=-all", "--inh-caps=-all"]
    return ["env", "-i", *config["Env"], "chroot", str(root), *privileges, *command]


def test_the_image_says_who_it_is_and_holds_no_secret(image: str, root: Path) -> None:
    config = configuration(image)
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["adapterd"]
    assert config["Cmd"][0] == "serve"
    assert not (root / "etc/pip.conf").exists() or (root / "etc/pip.conf").stat().st_size == 0
    history = run("buildah", "inspect", "--type", "image", "--format", "{{.History}}", image)
    assert "pip-config" in history or "pip install" not in history
    for line in pip_settings().splitlines()[1:]:
        assert line.partition(" = ")[2] not in history
    size = int(run("du", "--summarize", "--bytes", "--one-file-system", str(root)).split()[0])
    parts = {p: run("du", "-sb", str(root / p)).split()[0] for p in ("opt/adapterd", "usr")}
    print(f"the image's files take {size / 1e6:.0f} MB: {parts}")
    assert size < 2.5e9


def test_there_is_no_compiler_and_no_installer_in_it(root: Path) -> None:
    for name in ("c++", "g++", "gcc", "cc", "pip", "pip3"):
        assert not [p for p in ("usr/bin", "opt/adapterd/bin") if (root / p / name).exists()], name


def test_it_reads_object_stores(image: str, root: Path) -> None:
    """What adapters-sync pulls from needs packages that a plain installation leaves out."""
    command = inside(root, image, "python3", "-c", "import s3fs, gcsfs")
    assert subprocess.run(command, stderr=subprocess.PIPE, check=False).stderr == b""


def test_its_root_cannot_be_written_even_where_the_user_could(image: str, root: Path) -> None:
    done = subprocess.run(
        inside(root, image, "python3", "-c", "import os; print(os.getuid()); open('/opt/x', 'w')"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "65532\n"
    assert "Read-only file system" in done.stderr


@contextmanager
def serving(root: Path, image: str, *prefix: str) -> Iterator[tuple[str, list[str]]]:
    """The image's own command, behind `prefix`: its url once it is ready, and its log, filled when it has left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = configuration(image)
    command = inside(root, image, *config["Entrypoint"], *config["Cmd"], "--port", str(port))
    began = time.monotonic()
    process = subprocess.Popen(
        [*prefix, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    log: list[str] = []
    try:
        url, deadline = f"http://127.0.0.1:{port}", began + START_SECONDS
        while True:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "it does not become ready"
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        print(f"ready after {time.monotonic() - began:.1f} s")
        yield url, log
    finally:
        process.send_signal(signal.SIGTERM)
        log += process.communicate(timeout=60)
    assert process.returncode == 0, log


def test_it_serves_the_embedded_base_and_an_adapter(image: str, root: Path) -> None:
    question = "I was charged twice for order 48213 and I am really angry. Please fix it today."
    body = {
        "model": "mini:support",
        "temperature": 0,
        "messages": [{"role": "user", "content": question}],
    }
    with serving(root, image) as (url, log):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"].startswith("Category: Billing")
    assert "C++ operators loaded from /opt/adapterd/share/adapterd/native-" in "".join(log)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group of its own with this limit, of the version that the host has."""
    version_1 = Path("/sys/fs/cgroup/memory")
    parent, limit = (
        (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (version_1.parent, "memory.max")
    )
    group = parent / f"adapterd-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def test_it_sizes_itself_within_its_memory_limit(image: str, root: Path) -> None:
    """Not by what the machine has free, a tenth of which would be adapter memory, up to 1 GiB."""
    limit_bytes = 1536 * 2**20
    enter = 'echo $$ > "$0"/cgroup.procs; exec "$@"'
    with (
        memory_group(limit_bytes) as group,
        serving(root, image, "sh", "-c", enter, str(group)) as (url, _),
    ):
        text = httpx.get(f"{url}/metrics").text
    (adapter_bytes,) = re.findall(r"^adapterd_adapter_memory_bytes\{.*\} (\S+)", text, re.MULTILINE)
    assert 0 < float(adapter_bytes) < limit_bytes / 10


def test_it_trains_with_the_same_image(image: str, root: Path) -> None:
    settings = ["--out=/tmp/trained", "--epochs=0.05"]
    recipe = "/opt/adapterd/share/adapters/moderation/recipe.toml"
    done = subprocess.run(
        inside(root, image, "adapterd", "train", recipe, *settings),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
    assert (root / "tmp/trained/moderation/adapter_model.safetensors").exists()
    shutil.rmtree(root / "tmp/trained")
