"""Fetch the common tests of the installed transformers release.

transformers keeps the tests that each of its models passes in files such as
`test_modeling_common.py`. A source distribution holds those files for exactly its version, the
wheel does not. This script unpacks them as the package `transformers_tests`:

    tests/.transformers-common/<version>/transformers_tests/

and adds `tests/common_stubs`, which stands in for the few modules that the files import and the
source distribution lacks. Nothing is downloaded when the folder is there.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".transformers-common"
STUBS = HERE / "common_stubs"


def requirement(distribution: metadata.Distribution) -> str:
    """What pip should fetch: the archive that was installed, or else the release of its version."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "archive_info" in origin and not origin["url"].endswith(".whl"):
        return f"transformers @ {origin['url']}"
    return f"transformers=={distribution.version}"


def download(wanted: str, folder: Path) -> Path:
    """Let pip find and fetch a source archive, so that its index, proxy and cache settings hold."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    try:
        subprocess.run([*pip, "download", *options, wanted], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"pip could not download the source distribution of {wanted}, which holds the common "
            f"tests of transformers (exit code {error.returncode}, its message is above). Check "
            "the network and pip's settings, then run `make common-tests` again."
        ) from error
    (archive,) = folder.iterdir()
    return archive


def unpack(archive: Path, package: Path) -> None:
    """Write `<root>/tests/*.py` of the archive into a package of its own."""
    package.mkdir()
    with tarfile.open(archive) as files:
        for member in files:
            path = PurePosixPath(member.name)
            if member.isfile() and path.match("*/tests/*.py") and len(path.parts) == 3:
                (package / path.name).write_bytes(files.extractfile(member).read())
    if not (package / "test_modeling_common.py").exists():
        raise SystemExit(f"{archive.name} holds no tests/test_modeling_common.py.")
    (package / "__init__.py").touch()  # read by test_configuration_common.py, so it has to exist


def main() -> None:
    transformers = metadata.distribution("transformers")
    package = CACHE / transformers.version / "transformers_tests"
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        # Moved into place only when complete, so that an interrupted run leaves no half a package.
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            print(f"Fetching the common tests of transformers {transformers.version}.", flush=True)
            downloads, unpacked = Path(scratch, "downloads"), Path(scratch, "package")
            downloads.mkdir()
            unpack(download(requirement(transformers), downloads), unpacked)
            unpacked.rename(package)
    shutil.copytree(STUBS, package, dirs_exist_ok=True)  # always, since they change with our code
    print(f"The common tests of transformers {transformers.version} are in {package}.")


if __name__ == "__main__":
    main()
