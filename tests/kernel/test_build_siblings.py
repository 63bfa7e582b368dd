"""Binds beside each other that are done in one go come to what they come to one by one."""

import errno
import os
import re
import signal
import time

import pytest

import sandboxfs.build
from sandboxfs.build import assemble, compiled, siblings
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, fscontext, inside, submounts, syscalls
from sandboxfs.plan import from_spec
from sandboxfs.spec import load
from tests.support import in_namespace, make_bundle, mount_tmpfs, untouched

pytestmark = pytest.mark.needs("root", "overlay", "detached-nesting")

# With it the plan is one that `build.usual` builds.
DEV = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
COUNT = 5


def there(rootfs):
    for number in range(COUNT):
        (rootfs / f"d/{number}").mkdir(parents=True)


def missing(_rootfs):
    pass


def some_there(rootfs):
    for number in (0, 1, 3):
        (rootfs / f"d/{number}").mkdir(parents=True)


def behind_a_link(rootfs):
    there(rootfs)
    (rootfs / "d").rename(rootfs / "elsewhere")
    (rootfs / "d").symlink_to("elsewhere")


def with_a_link(rootfs):
    there(rootfs)
    (rootfs / "d/2").rmdir()
    (rootfs / "d/2").symlink_to("/elsewhere")


def with_a_link_that_leads_out(rootfs):
    there(rootfs)
    (rootfs / "d/2").rmdir()
    (rootfs / "d/2").symlink_to("../../../tmp/out")


def a_file_where_a_directory_goes(rootfs):
    there(rootfs)
    (rootfs / "d/3").rmdir()
    (rootfs / "d/3").touch()


def sources_of_directories(tmp_path):
    return [tmp_path / f"sources/{number}" for number in range(COUNT)]


def sources_of_both(tmp_path):
    sources = sources_of_directories(tmp_path)
    for number in (1, 2):
        sources[number].rmdir()
        sources[number].write_text(f"{number}")
    return sources


def sources_in_several_places(tmp_path):
    sources = sources_of_directories(tmp_path)
    (tmp_path / "sources/0/below").mkdir()
    return [*sources[:3], tmp_path / "sources/0/below", tmp_path / "sources/4/."]


def sources_behind_links(tmp_path):
    (tmp_path / "alias").symlink_to("sources")
    (tmp_path / "sources/link").symlink_to("1")
    return [tmp_path / f"alias/{name}" for name in ("0", "link", "2", "../sources/3", "4")]


def sources_with_dots(tmp_path):
    sources = sources_of_directories(tmp_path)
    return [*sources[:2], tmp_path / "sources/..", sources[3], f"{tmp_path}/sources/."]


def one_that_is_missing(tmp_path):
    sources = sources_of_directories(tmp_path)
    sources[3].rmdir()
    return sources


LOWERS = (
    there, missing, some_there, behind_a_link, with_a_link, with_a_link_that_leads_out,
    a_file_where_a_directory_goes,
)
SOURCES = (
    sources_of_directories, sources_of_both, sources_in_several_places, sources_behind_links,
    sources_with_dots, one_that_is_missing,
)


def planned(bundle):
    plan = from_spec.plan(load.load(bundle))
    plan.engine = "detached"
    return plan


@pytest.fixture
def point(tmp_path):
    """Return a directory that roots are attached on."""
    (tmp_path / "point").mkdir()
    return tmp_path / "point"


def bundle_with(tmp_path, lower, sources, mounts, names=range(COUNT)):
    for number in range(COUNT):
        (tmp_path / f"sources/{number}").mkdir(parents=True)
    bundle = make_bundle(tmp_path)
    lower(bundle.rootfs)
    bundle.document["mounts"] = [*mounts, *(
        {"destination": f"/d/{name}", "type": "bind", "options": ["rbind", "nosuid", "ro"],
         "source": str(source)} for name, source in zip(names, sources(tmp_path), strict=True)
    )]
    bundle.document["linux"].update(maskedPaths=[], readonlyPaths=[])
    bundle.write(bundle.document)
    return bundle


def seen(plan, point):
    """Build a plan and return what the kernel tells of its mounts, or the error's words."""
    try:
        root = sandboxfs.build(plan)
    except MountError as error:
        return re.sub(r"fd/\d+", "fd/N", str(error))
    with root:
        kinds = [(operation and operation.origin, kind) for operation, kind, _ in root.outcomes]
        root.attach(point)
    with open("/proc/self/mountinfo") as table:
        fields = [line.split() for line in table]
    syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
    return kinds, sorted(
        # device and root of what is mounted, where, and how
        (each[2] if each[3] != "/" else "", each[3], each[4], each[5], each[6])
        for each in fields if each[4].startswith(str(point))
    )


def grouped(plan):
    return [len(each.operations) for each in compiled.compile_once(plan).operations
            if hasattr(each, "names")]


@pytest.mark.parametrize(("dozen", "very_many"), [
    (siblings.A_DOZEN, siblings.VERY_MANY), (COUNT, siblings.VERY_MANY), (COUNT, COUNT),
], ids=["by path", "by name", "template"])
@pytest.mark.parametrize("mounts", [[], [DEV]], ids=["alone", "usual"])
@pytest.mark.parametrize("sources", SOURCES, ids=lambda sources: sources.__name__)
@pytest.mark.parametrize("lower", LOWERS, ids=lambda lower: lower.__name__)
def test_the_mounts_are_those_that_each_bind_by_itself_comes_to(
    tmp_path, monkeypatch, point, lower, sources, mounts, dozen, very_many
):
    bundle = bundle_with(tmp_path, lower, sources, mounts)

    def build():
        monkeypatch.setattr(siblings, "VERY_MANY", very_many)
        monkeypatch.setattr(siblings, "A_DOZEN", dozen)
        monkeypatch.setattr(submounts, "own_process", very_many == COUNT)
        plan = planned(bundle)
        assert grouped(plan) == [COUNT]
        ours = [seen(plan, point) for _again in range(3)]
        monkeypatch.setattr(compiled, "MANY", COUNT + 2)
        plan = planned(bundle)
        assert grouped(plan) == []
        return ours, seen(plan, point)

    with untouched(bundle.rootfs), untouched(tmp_path / "sources"):
        ours, theirs = in_namespace(build)
    assert ours == [theirs] * 3
    if sources is one_that_is_missing:
        assert f"[{3 + len(mounts)}]: open_tree" in theirs
        assert "ENOENT" in theirs
    elif sources is sources_of_both and lower is not missing:
        assert "/d/1: EISDIR" in theirs
    elif lower is a_file_where_a_directory_goes:
        assert "/d/3: ENOTDIR" in theirs
    else:
        assert sum(each[3].startswith("ro,nosuid") for each in theirs[1]) == COUNT


@pytest.fixture
def templates(monkeypatch):
    """Yield a list of whether a template was made, one for each list of siblings gathered."""
    made = []
    monkeypatch.setattr(siblings, "VERY_MANY", COUNT)
    monkeypatch.setattr(siblings, "A_DOZEN", COUNT)
    # What is built is built in a child of its own.
    monkeypatch.setattr(submounts, "own_process", True)
    may_have = siblings.Siblings.may_have_template

    def noted(self, directory):
        made.append(may_have(self, directory))
        return made[-1]

    monkeypatch.setattr(siblings.Siblings, "may_have_template", noted)
    return made


def with_a_mount_below(sources):
    mount_tmpfs(sources / "2")
    (sources / "2/seen").mkdir()


def with_a_mount_deeper_below(sources):
    (sources / "2/in").mkdir()
    mount_tmpfs(sources / "2/in")


def shared(sources):
    mount_tmpfs(sources)
    for number in range(COUNT):
        (sources / f"{number}").mkdir()
    fd = os.open(sources, abi.O_PATH | os.O_CLOEXEC)
    syscalls.mount_setattr(fd, propagation=abi.MS_SHARED)
    os.close(fd)


def with_flags(sources):
    mount_tmpfs(sources)
    for number in range(COUNT):
        (sources / f"{number}").mkdir()
    fd = os.open(sources, abi.O_PATH | os.O_CLOEXEC)
    noatime = abi.MOUNT_ATTR_NOATIME
    syscalls.mount_setattr(fd, abi.MOUNT_ATTR_NODEV | noatime, abi.MOUNT_ATTR__ATIME)
    os.close(fd)


def without_links(sources):
    with_flags(sources)
    fd = os.open(sources, abi.O_PATH | os.O_CLOEXEC)
    syscalls.mount_setattr(fd, abi.MOUNT_ATTR_NOSYMFOLLOW)
    os.close(fd)


@pytest.mark.parametrize(("arrange", "options", "made"), [
    (None, ["rbind", "nosuid"], True),
    (None, ["rbind", "ro", "noexec", "rprivate"], True),
    (None, ["rbind", "dev", "suid", "strictatime"], True),
    (None, ["rbind", "rro", "nosuid"], True),
    (None, ["rbind"], False),  # one call does it all
    (None, ["bind", "nosuid"], False),
    (None, ["rbind", "nosuid", "rslave"], False),
    (None, ["rbind", "nosuid", "rshared"], False),
    (None, ["rbind", "nosymfollow"], False),
    (None, ["rbind", "symfollow"], False),
    (shared, ["rbind", "nosuid"], True),
    (with_flags, ["rbind", "nosuid"], True),
    (with_flags, ["rbind", "dev", "relatime"], True),
    (without_links, ["rbind", "nosuid"], False),
    (with_a_mount_below, ["rbind", "nosuid"], False),
    (with_a_mount_deeper_below, ["rbind", "nosuid"], False),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_template_of_the_sources_changes_nothing(
    tmp_path, monkeypatch, point, templates, arrange, options, made
):
    bundle = bundle_with(tmp_path, there, sources_of_directories, [DEV])
    for entry in bundle.document["mounts"][1:]:
        entry["options"] = options
    bundle.write(bundle.document)

    def build():
        if arrange is not None:
            arrange(tmp_path / "sources")
        plan = planned(bundle)
        ours = [seen(plan, point) for _again in range(2)]
        assert set(templates) == {made}
        monkeypatch.setattr(compiled, "MANY", COUNT + 2)
        theirs = seen(planned(bundle), point)
        return ours, theirs

    ours, theirs = in_namespace(build)
    assert [without_numbers(each) for each in ours] == [without_numbers(theirs)] * 2
    assert sum(each[2].startswith(f"{point}/d/") for each in theirs[1]) >= COUNT


def without_numbers(found):
    """Leave out the numbers of peer groups, which no two mounts have in common."""
    return found[0], [(*each[:4], each[4].partition(":")[0]) for each in found[1]]


def test_no_link_of_the_sources_is_followed_to_what_lacks_the_flags(
    tmp_path, monkeypatch, point, templates
):
    """An absolute link leads out of the template: what it leads to has to get the flags, too."""
    bundle = bundle_with(tmp_path, there, sources_of_directories, [DEV])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sources/3").rmdir()
    (tmp_path / "sources/3").symlink_to(tmp_path / "elsewhere")

    def build():
        plan = planned(bundle)
        found = [seen(plan, point)[1] for _again in range(2)]
        assert set(templates) == {True}
        return found

    for mounts in in_namespace(build):
        (linked,) = [each for each in mounts if each[2] == f"{point}/d/3"]
        assert linked[1].endswith("/elsewhere")
        assert linked[3].startswith("ro,nosuid")


def test_binds_on_one_name_lie_on_each_other(tmp_path, monkeypatch, point):
    names = ("0", "1", "0", "2", "0")
    bundle = bundle_with(tmp_path, missing, sources_of_directories, [DEV], names)

    def build():
        plan = planned(bundle)
        assert grouped(plan) == [COUNT]
        ours = [seen(plan, point) for _again in range(2)]
        monkeypatch.setattr(compiled, "MANY", COUNT + 2)
        return ours, seen(planned(bundle), point)

    ours, theirs = in_namespace(build)
    assert ours == [theirs] * 2
    assert sum(each[2] == f"{point}/d/0" for each in theirs[1]) == 3


def entry(destination, options="rbind", **more):
    return {"destination": destination, "type": "bind", "source": "/", "options": [options], **more}


TMPFS = {"destination": "/m", "type": "tmpfs", "source": "tmpfs"}


@pytest.mark.parametrize(("mounts", "groups"), [
    ([entry(f"/d/{name}") for name in "abc"], [3]),
    ([entry(f"/{name}") for name in "abc"], [3]),
    ([entry(f"/d/{name}") for name in "ab"], []),
    ([entry(f"/d/{name}") for name in "abc"] + [entry(f"/e/{name}") for name in "abcd"], [3, 4]),
    ([entry("/d/a"), entry("/d/b"), entry("/d/c/in"), entry("/d/d")], []),
    ([entry("/d/a"), entry("/d/b"), TMPFS, entry("/d/d")], []),
    ([entry("/d/a"), entry("/d/b"), entry("/d/c", "bind")], []),
    ([entry("/d/a"), entry("/d/b"), entry("/d/c"), entry("/d/d", "ro")], [3]),
    ([entry("/d/a"), entry("/d/b"), entry("/d/e/..")], []),
    ([entry("/d/a"), entry("/d/b"), entry("/d/.")], []),
    ([entry("/d/a"), entry("/d/b"), entry("/d/")], []),
    ([entry("/d/a"), entry("/d/b"), entry("/d/.hidden")], [3]),
    ([entry("/d/a"), entry("/d/b"), entry("/d/c/")], []),
    ([entry(f"/d/{name}", "dest-nofollow") for name in "abc"], []),
    ([entry(f"/d/{name}", "copy-symlink") for name in "abc"], []),
])
def test_siblings_are_plain_binds_on_names_in_one_directory(tmp_path, mounts, groups):
    bundle = make_bundle(tmp_path)
    bundle.document["mounts"] = mounts
    bundle.write(bundle.document)
    plan = planned(bundle)
    assert grouped(plan) == groups
    flat = [each for step in plan.compiled.operations
            for each in getattr(step, "operations", [step])]
    assert flat == list(plan.operations)


def autofs(sources):
    """A map that we are the daemon of: what we look up isn't asked for."""
    reader, writer = os.pipe()
    mount = fscontext.create(b"autofs", [
        fscontext.string(key, value) for key, value in (
            (b"source", b"map"), (b"fd", b"%d" % writer), (b"pgrp", b"%d" % os.getpgrp()),
            (b"minproto", b"5"), (b"maxproto", b"5"))
    ] + [fscontext.flag(b"indirect")], 0)
    syscalls.move_mount_path(mount, abi.AT_FDCWD, os.fsencode(sources))
    for fd in (mount, reader, writer):
        os.close(fd)
    for number in range(COUNT):
        (sources / f"{number}").mkdir()


@pytest.mark.needs("autofs")
def test_an_automounter_is_asked_for_what_the_host_gets(tmp_path, point, templates):
    """What it mounts for a clone it mounts on the host, and the kernel would ask 40 times."""
    bundle = bundle_with(tmp_path, there, sources_of_directories, [DEV])

    def build():
        autofs(tmp_path / "sources")
        found = seen(planned(bundle), point)
        return set(templates), len(found[1])

    assert in_namespace(build) == ({False}, COUNT + 3)


@pytest.mark.parametrize("mounts", [[], [DEV]], ids=["alone", "usual"])
def test_an_interrupt_leaves_no_template_open(tmp_path, monkeypatch, templates, mounts):
    bundle = bundle_with(tmp_path, there, sources_of_directories, mounts)

    def interrupted(self, call, clones, settings):
        raise KeyboardInterrupt

    def build():
        plan = planned(bundle)
        monkeypatch.setattr(siblings.Siblings, "set", interrupted)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(KeyboardInterrupt):
            sandboxfs.build(plan)
        del plan  # has watched the mount table
        assert set(templates) == {True}
        return before, os.listdir("/proc/self/fd")

    before, after = in_namespace(build)
    assert after == before


def test_nothing_of_an_interrupted_build_is_believed(tmp_path, monkeypatch, point):
    """It has attached some siblings; the next build, on its long way, has to attach them all."""
    led = {"destination": "/link/a", "type": "bind", "source": "/", "options": ["bind"]}
    bundle = bundle_with(tmp_path, with_a_link, sources_of_directories, [led])
    link = bundle.rootfs / "link"

    def interrupted(self, calls, step, attached):
        raise KeyboardInterrupt

    def build():
        plan = planned(bundle)
        compiled.compile_once(plan).usual = None
        link.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(assemble._Assembly, "do_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                sandboxfs.build(plan)
        # Now the first bind is led elsewhere, and all that follow go the long way.
        link.rmdir()
        (bundle.rootfs / "real").mkdir()
        link.symlink_to("real")
        return seen(plan, point)[1]

    # A link as a mountpoint is what the prepared calls don't do.
    found = {each[2].removeprefix(str(point)) for each in in_namespace(build)}
    assert found >= {"/real/a", "/d/0", "/d/1", "/elsewhere", "/d/3", "/d/4"}


def renamed_for(seconds, directory, other):
    """Rename a directory to and fro in a child, as whoever owns what is above; returns its pid."""
    child = os.fork()
    if child:
        return child
    try:
        os.setgid(61234)
        os.setuid(61234)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            os.rename(directory, other)
            os.rename(other, directory)
    finally:
        os._exit(0)


@pytest.mark.parametrize("asked_by_path", [False, True], ids=["", "control"])
def test_nobody_who_renames_the_sources_shows_what_a_mount_hides(
    tmp_path, monkeypatch, point, asked_by_path
):
    bundle = bundle_with(tmp_path, there, sources_of_directories, [DEV])
    owned, sources = tmp_path / "owned", tmp_path / "owned/sources"
    for entry in bundle.document["mounts"][1:]:
        entry["source"] = f"{sources}/{os.path.basename(entry['source'])}"
    bundle.write(bundle.document)

    def build():
        monkeypatch.setattr(siblings, "VERY_MANY", COUNT)
        monkeypatch.setattr(siblings, "A_DOZEN", COUNT)
        monkeypatch.setattr(submounts, "own_process", not asked_by_path)
        if asked_by_path:
            monkeypatch.setattr(inside, "is_empty", lambda _descriptor: None)
            monkeypatch.setattr(
                submounts, "is_surely_bare", lambda here: not submounts.below(here, limit=1))
        owned.mkdir()
        mount_tmpfs(owned)
        for number in range(COUNT):
            (sources / f"{number}").mkdir(parents=True)
        (sources / "4/hidden").touch()
        mount_tmpfs(sources / "4")
        for path in (owned, sources):
            os.chown(path, 61234, 61234)
        for path in (tmp_path, *tmp_path.parents):
            path.chmod(path.stat().st_mode | 0o011)
        plan = planned(bundle)
        found = set()
        child = renamed_for(3, sources, f"{owned}/other")
        try:
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                try:
                    root = sandboxfs.build(plan)
                except MountError:
                    continue  # at that moment it had another name
                with root:
                    root.attach(point)
                    found.add((point / "d/4/hidden").exists())
                    syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
                if True in found:
                    break
        finally:
            if True in found:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        return found

    found = in_namespace(build)
    assert (True in found) == asked_by_path
    assert found


@pytest.mark.parametrize(("own_process", "asked_by_path"), [
    (True, False), (False, False), (False, True)], ids=["ours alone", "a program's", "control"])
def test_nobody_who_renames_a_directory_hides_what_is_mounted_below(
    tmp_path, monkeypatch, own_process, asked_by_path
):
    """Paths may say that nothing is, while what is above has another name."""
    def build():
        monkeypatch.setattr(submounts, "own_process", own_process)
        if asked_by_path:
            monkeypatch.setattr(inside, "is_empty", lambda _descriptor: None)
        owned = tmp_path / "owned"
        (owned / "one/in").mkdir(parents=True)
        mount_tmpfs(owned / "one/in")
        for path in (owned, owned / "one"):
            os.chown(path, 61234, 61234)
        for path in (tmp_path, *tmp_path.parents):
            path.chmod(path.stat().st_mode | 0o011)
        here = os.open(owned / "one", os.O_PATH | os.O_CLOEXEC)
        found = set()
        child = renamed_for(1.5, owned / "one", owned / "two")
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            try:
                found.add(len(submounts.below(here)))
            except OSError as error:
                found.add(errno.errorcode[error.errno])
        os.close(here)
        return found

    found = in_namespace(build)
    assert 1 in found
    assert found <= {0, 1, "EAGAIN", "ENOENT"}
    assert (0 in found) == asked_by_path


def test_without_a_way_back_to_our_own_root_nothing_goes_on(tmp_path, monkeypatch, templates):
    bundle = bundle_with(tmp_path, there, sources_of_directories, [])
    (tmp_path / "mounted").mkdir()

    def build():
        # Else the temporary directory may be a mount with none on it, and nothing has to be asked.
        mount_tmpfs(tmp_path / "mounted")
        chroot, failing = submounts.os.chroot, []

        def stuck(path):
            if path == b"." and failing:
                raise OSError(errno.ENOMEM, "no")
            chroot(path)

        may_have = siblings.Siblings.may_have_template

        def looked(self, directory):
            failing.append(True)
            try:
                return may_have(self, directory)
            finally:
                failing.clear()

        monkeypatch.setattr(siblings.Siblings, "may_have_template", looked)
        monkeypatch.setattr(submounts.os, "chroot", stuck)
        plan = planned(bundle)
        compiled.compile_once(plan).usual = None
        with pytest.raises(RuntimeError, match="no way back"):
            sandboxfs.build(plan)

    in_namespace(build)
