# SPDX-License-Identifier: GPL-2.0-or-later
"""The operating system of the virtual machines: Debian 12 with two kernels, built once and cached.

The cache directory is named after a hash of the recipe below. So a changed recipe makes another
image, and the image does not depend on the checkout. The builder makes it beside and renames it, so
it is complete or absent. A lock makes a second builder wait.

The two kernels test zswapd's ways around the limits of older ones: "old" is the release's own
(6.1), "new" is that of backports (6.12: noswap tmpfs, FUSE_NOTIFY_RESEND). The emulator starts them
without a boot loader.

Size: 370 MiB in a sparse file of 1 GiB. Time: about 40 s with a near mirror, mostly for unpacking.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE = "bookworm"
PYTHON = (3, 11)
"""The suite's Python; modules compiled for another one do not run there."""
KERNELS = ("old", "new")
BUILD_LIMIT_S = 900.0
DISK_MIB = 1024

SOURCES = f"""\
deb http://deb.debian.org/debian {SUITE} main
deb http://deb.debian.org/debian {SUITE}-updates main
deb http://deb.debian.org/debian-security {SUITE}-security main
deb http://deb.debian.org/debian {SUITE}-backports main
"""

PACKAGES = (
    "systemd",
    "systemd-sysv",
    "udev",
    "fuse3",
    "libfuse3-3",
    "liblzo2-2",
    "python3",
    "kmod",
    "mount",
    "util-linux",
    "procps",
    "nbdkit",
    "libnbd-bin",
    "initramfs-tools",
    "linux-image-cloud-amd64",
)

# Units that only take time here, or that take the console.
MASKED = (
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "getty-static.service",
    "systemd-logind.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
)

FILES = {
    # A small initial file system: the emulator has to unpack it in emulation.
    "etc/initramfs-tools/conf.d/zvm": "MODULES=list\nCOMPRESS=gzip\nRESUME=none\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
    "etc/hostname": "zvm\n",
    "etc/fstab": "",
    "etc/modprobe.d/zvm.conf": (
        "blacklist kvm_amd\nblacklist kvm_intel\nblacklist powernow_k8\nblacklist ata_piix\n"
    ),
    "etc/modules-load.d/zvm.conf": "loop\nfuse\nvirtio_console\n",
    "etc/sysctl.d/zvm.conf": (
        "kernel.sysrq = 1\nkernel.printk = 7\nkernel.hung_task_timeout_secs = 60\n"
    ),
    # The journal goes to the console too: a test can still read it when the machine hangs.
    "etc/systemd/journald.conf.d/zvm.conf": (
        "[Journal]\nStorage=volatile\nForwardToConsole=yes\nTTYPath=/dev/ttyS0\n"
        "MaxLevelConsole=info\n"
    ),
    "etc/systemd/system/opt-zvm.mount": (
        "[Unit]\nDefaultDependencies=no\n"
        "[Mount]\nWhat=/dev/disk/by-id/virtio-payload\nWhere=/opt/zvm\nType=ext4\nOptions=ro\n"
    ),
    # The agent answers from early boot until the end of a shutdown.
    "etc/systemd/system/zvm-agent.service": (
        "[Unit]\nDefaultDependencies=no\nRequires=opt-zvm.mount\nAfter=opt-zvm.mount"
        " systemd-modules-load.service\n"
        "[Service]\nExecStart=/opt/zvm/bin/agent\nOOMScoreAdjust=-1000\nLimitMEMLOCK=infinity\n"
        "Restart=always\nRestartSec=1\n"
        "[Install]\nWantedBy=sysinit.target\n"
    ),
}

# $1 is the root directory of the new system. /run and /tmp stay out of the image.
UNSHARED = (
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
)
"""The start of a command that runs in mount and process namespaces of its own."""
_ESSENTIAL_HOOK = 'cp --recursive --no-target-directory "{files}" "$1"'
_CUSTOMIZE_HOOK = f"""set -e
chroot "$1" apt-get install --yes --no-install-recommends \
--target-release={SUITE}-backports linux-image-cloud-amd64
cp --recursive --no-target-directory "{{files}}" "$1"
chroot "$1" systemctl enable zvm-agent.service
chroot "$1" systemctl mask {" ".join(MASKED)}
chroot "$1" passwd --delete root
: > "$1/etc/machine-id"
"""
_OPTIONS = (
    "--mode=root",
    "--variant=apt",
    "--aptopt=APT::Install-Recommends false",
    "--dpkgopt=force-unsafe-io",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    f"--include={','.join(PACKAGES)}",
)


@dataclass(frozen=True, slots=True)
class Image:
    """A bootable system.

    Attributes:
        directory: the directory with the disk, the kernels and their initrds.
    """

    directory: Path

    @property
    def disk(self) -> Path:
        """The root file system; open it read-only or as a snapshot."""
        return self.directory / "root.img"

    def kernel(self, name: str) -> Path:
        """Return the kernel "old" or "new"."""
        return self.directory / f"{name}.vmlinuz"

    def initrd(self, name: str) -> Path:
        """Return the initial file system of a kernel."""
        return self.directory / f"{name}.initrd"


def cache() -> Path:
    """Return the cache: ZSWAPD_VM_CACHE, or zswapd-vm in the user's cache directory."""
    named = os.environ.get("ZSWAPD_VM_CACHE")
    return (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zswapd-vm"
    )


def key() -> str:
    """Return the hash of the recipe."""
    recipe = (
        SUITE,
        DISK_MIB,
        SOURCES,
        PACKAGES,
        MASKED,
        sorted(FILES.items()),
        _ESSENTIAL_HOOK,
        _CUSTOMIZE_HOOK,
        _OPTIONS,
    )
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]


def find() -> Image | None:
    """Return the image of this recipe if it is built."""
    directory = cache() / f"image-{key()}"
    return Image(directory) if directory.is_dir() else None


def build() -> Image:
    """Return the image of this recipe; build it first if it is missing, which takes minutes.

    Raises:
        HarnessError: not root, a program is missing, or the mirror cannot be reached.
    """
    ready = find()
    if ready is not None:
        return ready
    if os.geteuid() != 0:
        raise HarnessError(
            "the image is not built yet, and only root can build it", hint="sudo scripts/vm build"
        )
    with locked():
        ready = find()  # another builder may have built it during the wait
        if ready is None:
            _build(cache() / f"image-{key()}")
            ready = Image(cache() / f"image-{key()}")
        return ready


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the lock of the cache, and remove the remains of dead builders."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache().glob("building-*"):
            shutil.rmtree(left)
        yield


def _build(target: Path) -> None:
    work = cache() / f"building-{os.getpid()}"
    tree, product = work / "tree", work / "product"
    try:
        product.mkdir(parents=True)
        for name, text in FILES.items():
            file = work / "files" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        _make_tree(work, tree)
        _split(tree, product)
        product.rename(target)
        for old in target.parent.glob("image-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_tree(work: Path, tree: Path) -> None:
    """Install the packages into a directory.

    mmdebstrap runs in a mount namespace of its own, so no mount outlives it.
    """
    hooks = [
        f"--essential-hook={_ESSENTIAL_HOOK.format(files=work / 'files')}",
        f"--customize-hook={_CUSTOMIZE_HOOK.format(files=work / 'files')}",
    ]
    _run(
        *UNSHARED,
        "mmdebstrap",
        *_OPTIONS,
        *hooks,
        SUITE,
        str(tree),
        "-",
        stdin=SOURCES,
        directory=work,
    )


def _split(tree: Path, product: Path) -> None:
    """Move the kernels out of the tree and make a disk of the rest."""
    kernels = sorted((tree / "boot").glob("vmlinuz-*"), key=lambda path: _version(path.name))
    if len(kernels) != len(KERNELS):
        raise HarnessError(
            f"{len(kernels)} kernels were installed instead of {len(KERNELS)}: {kernels}"
        )
    for name, kernel in zip(KERNELS, kernels, strict=True):
        kernel.rename(product / f"{name}.vmlinuz")
        initrd = kernel.with_name(kernel.name.replace("vmlinuz-", "initrd.img-", 1))
        initrd.rename(product / f"{name}.initrd")
    # No journal: the changes of a run are thrown away.
    command = ("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(tree))
    _run(*command, str(product / "root.img"), f"{DISK_MIB}M", directory=product)


def _version(name: str) -> tuple[int, ...]:
    numbers = name.removeprefix("vmlinuz-").replace("+", ".").replace("-", ".").split(".")
    return tuple(int(number) for number in numbers if number.isdecimal())


def _run(*command: str, directory: Path, stdin: str = "") -> None:
    environment = {
        **os.environ,
        "TMPDIR": str(directory),
        "LC_ALL": "C",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    try:
        done = subprocess.run(
            command,
            check=False,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_LIMIT_S,
            env=environment,
        )
    except FileNotFoundError as error:
        raise HarnessError(
            f"{command[0]} is not installed", hint="scripts/vm installs all programs"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise HarnessError(
            f"{command[0]}: not done after {BUILD_LIMIT_S:.0f} s", hint="is the mirror slow?"
        ) from error
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise HarnessError(
            f"{' '.join(command[:1])} failed:\n{tail}",
            hint="it needs a Debian mirror: deb.debian.org",
        )
