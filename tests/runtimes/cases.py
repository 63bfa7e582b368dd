"""The table of cases that every runtime runs, with the hook and without."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sandboxfs.kernel import abi, fscontext, syscalls, usernamespace
from sandboxfs.spec.model import IdMapping
from tests.runtimes.container import (
    ALL_WRITTEN,
    FIRST_ID,
    IDS,
    NONE_WRITTEN,
    Container,
    Memory,
    View,
    Volume,
)
from tests.support import attach, bind
from tests.support.specs import Document

DOCUMENTS = ("runc", "crun", "containerd")
PODMAN = ("podman", "podman-rootless")
ALL = (*DOCUMENTS, *PODMAN, "docker")


class Place:
    """Where a case lays out what it needs.  `rootfs` is what the runtime is told."""

    def __init__(self, path: Path, rootfs: Path) -> None:
        self.path = path
        self.image = rootfs
        self.rootfs = rootfs

    def directory(self, name: str, *files: str) -> Path:
        """Make a directory with files in it, each holding its name."""
        path = self.path / name
        path.mkdir(mode=0o755)
        for file in files:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_text(f"{file}\n", "utf-8")
        return path

    def give_image_to(self, owner: int) -> None:
        """Make everything in the image belong to a user."""
        for path in [self.image, *self.image.rglob("*")]:
            os.lchown(path, owner, owner)


class Case:
    """One row of the table.

    make: lays out what is needed and returns the container; what it runs is the tests' script,
    with the container's own after it.  new: mountpoints that the hook adds.  writes: what the
    payload's attempts to write come to.  owner: who the image belongs to; None: who runs the
    container.  check: looks at the view with the hook.  compared: False where the runtime,
    without the hook, would change the image in a way that shows.
    """

    def __init__(
        self,
        make: Callable[[Place], Container],
        *,
        new: tuple[str, ...] = ("/tmp",),
        writes: list[str] = ALL_WRITTEN,
        runtimes: tuple[str, ...] = ALL,
        owner: int | None = None,
        check: Callable[[View], object] | None = None,
        compared: bool = True,
    ) -> None:
        self.name = make.__name__
        self.make = make
        self.new = new
        self.writes = writes
        self.runtimes = runtimes
        self.owner = owner
        self.check = check
        self.compared = compared


CASES: list[Case] = []


def case(**how):  # type: ignore[no-untyped-def]
    """Add the decorated function to the table; `how` as for `Case`."""

    def add(make: Callable[[Place], Container]) -> Callable[[Place], Container]:
        CASES.append(Case(make, **how))
        return make

    return add


# -- the ordinary --------------------------------------------------------------------------


@case()
def default(place: Place) -> Container:
    return Container()


@case(writes=NONE_WRITTEN)
def read_only_root(place: Place) -> Container:
    return Container(readonly=True)


@case()
def terminal(place: Place) -> Container:
    return Container(terminal=True)


@case(writes=NONE_WRITTEN, runtimes=DOCUMENTS)
def terminal_in_a_read_only_root(place: Place) -> Container:
    return Container(terminal=True, readonly=True)


def _in_work(view: View) -> None:
    assert "/place/deep" in view.lines("who"), view.sections["who"]


# podman looks for it in the image, and crun makes it there, by themselves.
@case(check=_in_work, compared=False, runtimes=("runc", "containerd"))
def working_directory_that_is_not_in_the_image(place: Place) -> Container:
    return Container(cwd="/place/deep")


# -- mounts --------------------------------------------------------------------------------


def _said(*lines: str) -> Callable[[View], None]:
    def check(view: View) -> None:
        assert tuple(view.lines("said")) == lines, view.sections["said"]

    return check


@case(check=_said("file", "below", "read-only", "made"))
def mounts_inside_a_read_only_bind(place: Place) -> Container:
    outer = place.directory("outer", "file", "inner/covered", "memory/covered")
    inner = place.directory("inner", "below")
    return Container(
        "echo '== said'; cat /outer/file; ls /outer/inner; "
        "touch /outer/new 2>/dev/null || echo read-only; touch /outer/memory/made; "
        "ls /outer/memory",
        mounts=[
            Volume(outer, "/outer", "ro"), Volume(inner, "/outer/inner", "ro"),
            Memory("/outer/memory", "mode=700", "size=64k"),
        ],
    )


@case(writes=NONE_WRITTEN, runtimes=DOCUMENTS)
def mounts_in_a_read_only_root_whose_mountpoints_are_missing(place: Place) -> Container:
    return Container(
        readonly=True,
        mounts=[Volume(place.directory("a", "file"), "/not/there/yet"),
                Volume(place.path / "a/file", "/etc/a/file"), Memory("/empty")],
    )


@case(runtimes=(*DOCUMENTS, *PODMAN))
def flags_of_binds_and_file_systems(place: Place) -> Container:
    path = place.directory("a", "file")
    return Container(mounts=[
        Volume(path, "/ro", "ro"), Volume(path, "/nosuid", "nosuid", "nodev", "noexec"),
        Volume(path / "file", "/etc/passwd.d", "ro"),
        Memory("/memory", "size=1m", "nosuid", "nodev", "noexec", "mode=1770"),
        Memory("/sealed", "size=1m", "ro"),
    ])


@case()
def propagation_of_binds(place: Place) -> Container:
    path = place.directory("a", "below/file")
    bind(path / "below", path / "below")
    words = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
    return Container(mounts=[Volume(path, f"/{word}", word) for word in words])


@case(runtimes=DOCUMENTS)
def unbindable_mounts(place: Place) -> Container:
    path = place.directory("a", "below/file")
    return Container(mounts=[
        Volume(path, "/one", "unbindable"), Volume(path / "below", "/one/below"),
        Volume(path, "/all", "runbindable"),
    ])


@case(runtimes=DOCUMENTS)
def mounts_on_mounts(place: Place) -> Container:
    one, other = place.directory("one", "1/file"), place.directory("other", "1/file", "2/file")
    return Container(mounts=[
        Volume(one, "/a"), Volume(other, "/a"), Volume(one, "/a/1"), Memory("/a/2", "size=64k"),
        Volume(other, "/a/1"), Memory("/b", "size=64k"), Memory("/b", "size=128k"),
    ])


@case()
def a_hundred_mounts(place: Place) -> Container:
    sources = place.directory("sources", *(f"{number}/file" for number in range(70)))
    for number in range(20):
        (sources / f"1/{number}").mkdir()
    binds = [Volume(sources / f"{number}", f"/many/{number}", "ro") for number in range(2, 40)]
    files = [Volume(sources / f"{number}/file", f"/files/{number}") for number in range(40, 70)]
    nested = [Volume(sources / f"{number}", f"/many/1/{number}") for number in range(20)]
    memory = [Memory(f"/memory/{number}", "size=64k") for number in range(12)]
    return Container(mounts=[Volume(sources / "1", "/many/1"), *binds, *files, *nested, *memory])


@case(runtimes=DOCUMENTS, check=_said("11 bytes"))
def names_that_shells_dislike(place: Place) -> Container:
    path = place.directory("a, b:c\\d\n\te")
    (path / "ä\u2028").write_text("eleven byte", "utf-8")
    return Container(
        "echo '== said'; cat /odd*/*/* | wc -c | sed 's/$/ bytes/'",
        mounts=[Volume(path, "/odd ones/x, y:z\\w\n")],
    )


# -- images --------------------------------------------------------------------------------


@case()
def image_without_mountpoints(place: Place) -> Container:
    for name in ("proc", "dev", "tmp", "sys", "run"):
        shutil.rmtree(place.image / name)
    return Container()


@case(new=())
def image_with_something_in_tmp(place: Place) -> Container:
    (place.image / "tmp/file").write_text("kept")
    return Container()


@case(new=(), runtimes=DOCUMENTS)
def image_whose_tmp_is_a_link(place: Place) -> Container:
    (place.image / "tmp").rmdir()
    (place.image / "var/tmp").mkdir(parents=True)
    (place.image / "tmp").symlink_to("var/tmp")
    return Container()


@case(check=_said("file"), runtimes=DOCUMENTS)
def image_with_links_on_the_way(place: Place) -> Container:
    for name, target in {"var/run": "/run", "data": "../../../srv/data", "log": "/nowhere"}.items():
        (place.image / name).parent.mkdir(exist_ok=True)
        (place.image / name).symlink_to(target)
    (place.image / "srv/data").mkdir(parents=True)
    path = place.directory("a", "file")
    return Container(
        "echo '== said'; ls /srv/data/volume",
        mounts=[Volume(path, "/data/volume"), Volume(path, "/var/run/volume")],
    )


@case(new=(), runtimes=DOCUMENTS)
def tmp_in_the_spec(place: Place) -> Container:
    return Container(mounts=[Memory("/tmp", "size=128k", "mode=1777")])


def _flags_of_the_root(*flags: str) -> Callable[[View], None]:
    def check(view: View) -> None:
        assert set(str(view.mounts["/"]["flags"]).split()) == set(flags), view.mounts["/"]

    return check


# crun takes the flags of a root away by itself.
@case(check=_flags_of_the_root("nosuid", "nodev"), runtimes=("runc", "containerd"))
def image_on_a_mount_with_flags(place: Place) -> Container:
    """A set-user-ID program of an image that must not be one stays harmless."""
    place.rootfs = place.directory("mounted")
    flags = abi.OPEN_TREE_CLONE
    clone = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(place.image), flags)
    syscalls.mount_setattr(clone, abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV)
    attach(clone, place.rootfs)
    return Container()


@case(runtimes=(*DOCUMENTS, "podman"))
def image_that_is_an_overlay(place: Place) -> Container:
    """As containerd's snapshotter makes them."""
    place.rootfs = place.directory("mounted")
    upper, work = place.directory("upper"), place.directory("work")
    settings = [fscontext.string(key, os.fsencode(path)) for key, path in (
        (b"lowerdir", place.image), (b"upperdir", upper), (b"workdir", work))]
    attach(fscontext.create(b"overlay", settings, 0), place.rootfs)
    return Container()


@case(runtimes=DOCUMENTS)
def mounts_of_the_host_below_the_image(place: Place) -> Container:
    """The runtimes bind the root recursively, so they are part of it."""
    (place.image / "srv").mkdir()
    bind(place.directory("a", "file"), place.image / "srv")
    return Container()


# -- namespaces ----------------------------------------------------------------------------


@case(owner=FIRST_ID, runtimes=DOCUMENTS)
def user_namespace(place: Place) -> Container:
    return Container(user=True)


@case(owner=FIRST_ID, runtimes=DOCUMENTS, writes=NONE_WRITTEN)
def user_namespace_and_read_only_root(place: Place) -> Container:
    outer = place.directory("outer", "inner/covered")
    return Container(
        user=True, readonly=True,
        mounts=[Volume(outer, "/outer", "ro"), Memory("/outer/inner", "size=64k")],
    )


@case(owner=FIRST_ID, runtimes=DOCUMENTS)
def user_namespace_and_terminal(place: Place) -> Container:
    return Container(user=True, terminal=True)


@case(owner=0, runtimes=DOCUMENTS)
def idmapped_image(place: Place) -> Container:
    """Owned by the host's root, shown to the container as its own."""
    place.rootfs = place.directory("mounted")
    clone = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(place.image), abi.OPEN_TREE_CLONE)
    ids = [IdMapping(0, FIRST_ID, IDS)]
    namespace = usernamespace.with_mappings(ids, ids)
    try:
        syscalls.mount_setattr(clone, abi.MOUNT_ATTR_IDMAP, userns_fd=namespace)
    finally:
        os.close(namespace)
    attach(clone, place.rootfs)
    return Container(user=True)


def _propagates(kind: str) -> Callable[[Document], object]:
    return lambda document: document["linux"].update(rootfsPropagation=kind)


def _propagation(kind: str) -> None:
    def make(place: Place) -> Container:
        path = place.directory("a", "file")
        mounts = [Volume(path, "/volume"), Volume(path, "/shared", "rshared")]
        return Container(mounts=mounts, change=_propagates(kind))

    make.__name__ = f"root_propagation_{kind}"
    # runc's mounts fail below an unbindable root.
    CASES.append(Case(make, runtimes=("crun",) if kind == "unbindable" else DOCUMENTS))


for each in ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable"):
    _propagation(each)


# -- everything else a spec can say about the root --------------------------------------------


@case(
    runtimes=DOCUMENTS, check=_said("fixed"),
    writes=[each.replace("done touch", "refused touch") for each in ALL_WRITTEN],
)
def devices_and_masks_of_the_spec(place: Place) -> Container:
    (place.image / "srv/secret").mkdir(parents=True)
    (place.image / "srv/secret/file").write_text("hidden")
    (place.image / "srv/key").write_text("hidden")
    (place.image / "srv/fixed").mkdir()

    def change(document: Document) -> None:
        document["linux"]["devices"] = [
            {"path": "/dev/sdx", "type": "b", "major": 7, "minor": 200, "fileMode": 0o640,
             "uid": 3, "gid": 4},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
        ]
        document["linux"]["maskedPaths"] += ["/srv/secret", "/srv/key", "/not/there"]
        document["linux"]["readonlyPaths"] += ["/srv/fixed", "/bin", "/not/there"]

    return Container(
        "echo '== said'; ls /srv/secret; cat /srv/key; "
        "touch /srv/fixed/x 2>/dev/null || echo fixed",
        change=change,
    )


@case(runtimes=DOCUMENTS)
def privileged(place: Place) -> Container:
    def change(document: Document) -> None:
        linux = document["linux"]
        del linux["maskedPaths"], linux["readonlyPaths"]
        document["process"]["noNewPrivileges"] = False
        for mount in document["mounts"]:
            if mount["type"] == "sysfs":
                mount["options"].remove("ro")

    return Container(change=change)


@case(runtimes=DOCUMENTS, new=())
def only_what_it_takes(place: Place) -> Container:
    """A /proc, a /dev with nothing in it, no /tmp.

    (Without a mount on /dev the runtimes make its nodes in the image, each time.)
    """
    (place.image / "tmp").rmdir()

    def change(document: Document) -> None:
        document["mounts"] = document["mounts"][:2]
        document["annotations"] = {"dev.sandboxfs.tmp": "keep"}
        document["linux"]["namespaces"] = [{"type": "pid"}, {"type": "mount"}]
        del document["linux"]["maskedPaths"], document["linux"]["readonlyPaths"]

    return Container(change=change)


@case(runtimes=PODMAN)
def podman_privileged(place: Place) -> Container:
    return Container(podman=["--privileged"])


@case(runtimes=PODMAN)
def podman_volumes_of_its_own(place: Place) -> Container:
    """Overlays that podman makes itself, shared memory, a mount of devpts."""
    path = place.directory("a", "file")
    return Container(podman=[f"--volume={path}:/copied:O", "--shm-size=128k",
                             "--mount=type=devpts,destination=/more/pts"])


# -- annotations ---------------------------------------------------------------------------


@case(new=(), check=_said("done mkdir"), runtimes=DOCUMENTS)
def tmp_is_kept(place: Place) -> Container:
    return Container(
        "echo '== said'; mkdir /tmp/x && echo done mkdir; rmdir /tmp/x",
        annotations={"dev.sandboxfs.tmp": "keep"},
    )


def _tmp_is_ours(view: View) -> None:
    assert view.mounts["/tmp"]["type"] == "tmpfs"
    assert view.lines("said") == []


@case(check=_tmp_is_ours, runtimes=DOCUMENTS)
def tmp_is_hidden(place: Place) -> Container:
    (place.image / "tmp/file").write_text("hidden")
    return Container("echo '== said'; ls /tmp | grep file",
                     annotations={"dev.sandboxfs.tmp": "tmpfs"})


@case(check=_said("refused", "fits"))
def size_of_the_overlay(place: Place) -> Container:
    return Container(
        "echo '== said'; dd if=/dev/zero of=/big bs=1k count=5000 2>/dev/null || echo refused; "
        "rm /big; dd if=/dev/zero of=/small bs=1k count=300 2>/dev/null && echo fits; rm /small",
        annotations={"dev.sandboxfs.overlay.size": "4M"},
    )

