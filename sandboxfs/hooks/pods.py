"""Volumes that the containers of a pod share: who is counted, what is made, what is taken away.

The store is ``pods`` in the state directory.  A pod is a directory in it, a hint's master a
directory of that with the pod's tmpfs on it, and `pod_record` tells what belongs together.
Everything happens under one lock.  Whoever is killed leaves a store that the next one
understands: a directory without a record is taken away, a container without a process isn't
counted, a pod without containers begins anew.
"""

from sandboxfs.errors import MountError, SpecError, StateError
from sandboxfs.hooks import pod_master, pod_record
from sandboxfs.kernel import system as os
from sandboxfs.spec import annotations
from sandboxfs.spec import options as option_words
from sandboxfs.spec.values import escaped
from sandboxfs.state.directory import open_state
from sandboxfs.state.lock import Lock

STORE = "pods"
_LOCK = "lock"


def _store(create=False):
    """Return the store's `Directory`, or None where there is none and `create` is false."""
    state = open_state(create, memory=True)
    if state is None:
        return None
    with state:
        return state.directory(STORE, create)


# -- createRuntime -----------------------------------------------------------------------


def enter(spec, state, policy, hints):
    """Count a container in its pod, and mount its replicas of the pod's volumes.

    spec: with the operator's policy applied.  state: the hook's, with the real pid.  hints:
    the container's own hints of pod volumes, possibly none: those recorded for the pod
    count, too.  Returns lines for the log.

    Raises SpecError for hints and mounts that don't fit what was recorded, MountError and
    StateError for what can't be done; nothing of this container is left in the store then.
    """
    pod = annotations.pod(spec.annotations)
    if pod is None:
        return []
    hints = [hint for hint in hints if hint.type == "tmpfs" and hint.share == "pod"]
    store = _store(create=bool(hints))
    if store is None:
        return []
    with store:
        if not hints and _read(store, pod.key) is None:
            return []
        start = pod_record.start_of(state.pid) if state.pid else None
        if start is None:
            raise StateError("state/pid", "", str(state.pid), "is no running process: who is to "
                             "be counted can't be told")
        container = pod_record.Container(state.id, state.pid, start)
        with Lock(store):
            visit = _Visit(store, pod, policy, spec, container)
            replicas = visit.enter(hints)
        try:
            visit.attach(replicas, state)
        except BaseException:
            try:
                _leave(store, container.id, pod.key)
            except (MountError, StateError):
                pass  # the first error is the one to tell; its process ends, as the next one sees
            raise
        finally:
            for replica in replicas:
                os.close(replica.clone)
        return visit.notes


class _Visit:
    """One container entering its pod, under the lock."""

    __slots__ = ("container", "ids", "key", "notes", "pod", "policy", "record", "spec", "store")

    def __init__(self, store, pod, policy, spec, container):
        self.store = store
        self.pod = pod
        self.key = pod.key
        self.policy = policy
        self.spec = spec
        self.container = container
        self.ids = pod_master.mappings_of(container.pid)
        self.record = None
        self.notes = []

    def enter(self, hints):
        """Return the list of `Replica` to attach, their clones open; all else is done."""
        self.record = _read(self.store, self.key)
        if self.record is not None:
            self.record.containers = self.record.living()
        if self.record is None or not self.record.containers:
            _sweep(self.store, self.key)
            if not hints:
                return []
            self.record = pod_record.Record(self.pod.id, self.pod.named)
        new = self.new_masters(hints)
        wanted = self.wanted(self.record.masters + new)
        with self.store.directory(self.key, create=True) as directory:
            replicas = []
            try:
                self.make(directory, new)
                for mount, master, attributes in wanted:
                    replicas.append(self.replica(directory, mount, master, attributes))
                # Under its old id, or by a hook that is registered twice: counted once.
                self.record.drop(self.container.id)
                self.record.containers.append(self.container)
                directory.write(pod_record.NAME, self.record.encoded())
            except BaseException:
                for replica in replicas:
                    os.close(replica.clone)
                self.take_back(directory, new)
                raise
        return replicas

    def new_masters(self, hints):
        """Return a `Master` for each hint that isn't recorded; SpecError if one doesn't fit."""
        new = []
        numbers = [int(master.directory) for master in self.record.masters]
        number = max(numbers, default=-1) + 1
        for hint in hints:
            known = self.record.master(hint.name)
            if known is None:
                other = self.record.of_source(hint.source)
                if other is not None:
                    raise SpecError(hint.origin, "", f'"{hint.source}"', f"hints {other.name} and "
                                    f"{hint.name} of pod {self.pod.id} have the same source")
                new.append(self.master(hint, str(number + len(new))))
            else:
                self.check(hint, known)
        return new

    def master(self, hint, directory):
        if len(hint.name.encode()) > 200 or not hint.name.isprintable():
            raise SpecError(hint.origin, "", hint.name,
                            "the name of a pod's volume is printable and at most 200 bytes long")
        options = list(hint.options)
        if not any(word.startswith("size=") for word in options):
            options.append("size=" + annotations.size(self.policy.hint_size))
        return pod_record.Master(hint.name, hint.source, options, self.size_asked(hint), directory)

    def size_asked(self, hint):
        """Return whether the hint's size is its own, not one the operator's policy filled in."""
        return any(
            word.startswith("size=")
            for prefix in annotations.HINT_PREFIXES
            for word in self.spec.annotations.get(f"{prefix}{hint.name}.options", "").split(",")
        )

    def said(self, hint, field):
        """Return the pointer of the annotation that holds a field of `hint`."""
        for prefix in annotations.HINT_PREFIXES:
            if f"{prefix}{hint.name}.{field}" in self.spec.annotations:
                return "/annotations/" + escaped(f"{prefix}{hint.name}.{field}")
        return hint.origin

    def check(self, hint, known):
        """Compare a hint with what was recorded when the pod's first container brought it."""
        if hint.source != known.source:
            raise SpecError(self.said(hint, "source"), "", f'"{hint.source}"', f"hint {hint.name} "
                            f'of pod {self.pod.id} was recorded with source "{known.source}"')
        asked = _comparable(hint.options, self.size_asked(hint))
        recorded = _comparable(known.options, known.size_asked)
        if not (self.size_asked(hint) and known.size_asked):
            # Who said no size takes the one there is.
            asked.pop("size", None)
            recorded.pop("size", None)
        if asked != recorded:
            raise SpecError(self.said(hint, "options"), "", f'"{",".join(hint.options)}"',
                            f"hint {hint.name} of pod {self.pod.id} was recorded with "
                            f'"{",".join(known.options)}"')

    def wanted(self, masters):
        """Return (mount, master, attributes) of the mounts that are replicas, in order."""
        from sandboxfs.plan.from_spec import cleaned

        sources = {master.source: master for master in masters}
        last = {cleaned(mount.destination): mount for mount in self.spec.mounts}
        found = []
        for mount in self.spec.mounts:
            master = sources.get(mount.source)
            if master is None or "remount" in mount.options:
                continue
            if last[cleaned(mount.destination)] is not mount:
                self.notes.append(f"mounts[{mount.index}]: hidden by a later mount on "
                                  f"{mount.destination}: no replica")
                continue
            found.append((mount, master, self.attributes(mount, master)))
        return found

    def attributes(self, mount, master):
        """Return the attributes of a replica; SpecError if it would be looser than its master."""
        pointer = f"/mounts/{mount.index}/options"
        words = option_words.parse(mount.options, pointer)
        if words.idmap or mount.uid_mappings or mount.gid_mappings:
            raise SpecError(pointer, "", mount.destination,
                            f"a replica of hint {master.name} can't be idmapped")
        attributes = option_words.within(words, option_words.parse(master.options))
        if attributes is None:
            raise SpecError(pointer, "", f'"{",".join(mount.options)}"', "looser than hint "
                            f'{master.name} of pod {self.pod.id}, recorded with '
                            f'"{",".join([*master.options, "nosuid", "nodev"])}"')
        option_words.refuse_lost_flags(mount, words, attributes)
        return attributes

    def make(self, directory, new):
        for master in new:
            pod_master.make(directory, master, self.ids, self.label())
            self.record.masters.append(master)
            self.notes.append(f"pod {self.pod.id}: hint {master.name}: a tmpfs, "
                              f"{','.join(master.options)}")

    def label(self):
        """Return the SELinux label of the container's mounts, or None where there is none."""
        label = self.spec.mount_label
        return label if label and os.path.exists("/sys/fs/selinux/enforce") else None

    def replica(self, directory, mount, master, attributes):
        from sandboxfs.hooks.pod_replica import Replica

        clone = pod_master.clone(directory, master, self.record.living())
        if clone is None:
            # Nobody has it mounted any more, so nobody has lost what was in it just now.
            self.notes.append(f"pod {self.pod.id}: hint {master.name}: was mounted nowhere, "
                              "made anew")
            pod_master.remove(directory, master.directory)
            pod_master.make(directory, master, self.ids, self.label())
            clone = pod_master.clone(directory, master, self.record.living())
        self.notes.append(f"pod {self.pod.id}: hint {master.name}: a replica at "
                          f"{mount.destination}")
        return Replica(mount, clone, attributes, master.device)

    def take_back(self, directory, new):
        """Undo `make`: the record on disk doesn't name them."""
        if directory.read(pod_record.NAME) is None:
            _remove(self.store, self.key)
            return
        for master in new:
            pod_master.remove(directory, master.directory)

    def attach(self, replicas, state):
        """Attach the replicas in the container's mount namespace, without the lock."""
        if not replicas:
            return
        from sandboxfs.hooks import pod_replica

        if not self.spec.root_path:
            raise SpecError("/root", text="is missing")
        rootfs = os.path.join(state.bundle, self.spec.root_path)
        owner = tuple(pod_master.outside(0, mapping) for mapping in self.ids)
        pod_replica.attach(replicas, self.spec.mounts, rootfs, self.container,
                           None if None in owner else owner)


def _comparable(options, size_asked):
    """Return option words as a dict that doesn't depend on their order."""
    found = {}
    for word in options:
        key, _, value = word.partition("=")
        if key in ("nosuid", "nodev"):
            continue  # always so
        if key in ("ro", "rw"):
            key, value = "access", key
        found[key] = value.lstrip("0") if key == "mode" else value
    if found.get("access") == "rw":
        del found["access"]
    return found


# -- poststop ----------------------------------------------------------------------------


def leave(state, policy=None):
    """Count a container no longer; with the last one that lives goes all the pod had.

    Nothing happens for an id that isn't counted.  Returns lines for the log.
    """
    store = _store()
    if store is None:
        return []
    with store:
        try:
            pod = annotations.pod(state.annotations)
        except SpecError:
            pod = None  # it never entered one
        return _leave(store, state.id, pod.key if pod is not None else None)


def _leave(store, container_id, key):
    """Drop a container from its pod; key: where it is likely to be, or None."""
    with Lock(store):
        keys = _keys(store)
        if key in keys:
            keys.remove(key)
            keys.insert(0, key)
        for each in keys:
            try:
                record = _read(store, each)
            except StateError:
                continue  # `pod delete` removes what can't be read
            if record is None:
                continue
            # Elsewhere it is one of another runtime with the same id, unless that has ended.
            if each != key and any(other.id == container_id for other in record.living()):
                continue
            if not record.drop(container_id):
                continue
            record.containers = record.living()
            if not record.containers:
                _remove(store, each)
                return [f"pod {record.id}: container {container_id} was the last: all is gone"]
            with store.directory(each) as directory:
                directory.write(pod_record.NAME, record.encoded())
            return [f"pod {record.id}: container {container_id} has left"]
    return []


# -- the store ---------------------------------------------------------------------------


def _keys(store):
    return [name for name in store.names() if name != _LOCK]


def _read(store, key):
    """Return a pod's `Record`, or None without one; StateError for one that can't be read."""
    directory = store.directory(key)
    if directory is None:
        return None
    with directory:
        content = directory.read(pod_record.NAME)
        if content is None:
            return None
        return pod_record.decoded(content, directory.where(pod_record.NAME))


def _remove(store, key):
    """Take a pod away: first its record, so that a kill leaves what the next one sweeps."""
    directory = store.directory(key)
    if directory is None:
        return
    with directory:
        directory.remove(pod_record.NAME)
        directory.remove(pod_record.NAME + ".new")
        for name in directory.names():
            pod_master.remove(directory, name)
    try:
        os.rmdir(key, dir_fd=store.fd)
    except OSError as error:
        raise MountError("", "rmdir", store.where(key), "", error.errno) from error


def _sweep(store, own):
    """Take away what nobody will come back for: pods without a record or a living container.

    own: the key of the pod that begins; its leftovers go, whatever they are.
    """
    for key in _keys(store):
        if key == own:
            _remove(store, key)
            continue
        try:
            record = _read(store, key)
            if record is None or not record.living():
                _remove(store, key)
        except (MountError, StateError):
            continue  # not for this container to fail by: `pod list` shows it


# -- the command line --------------------------------------------------------------------


class Seen:
    """A pod as it is listed: key, record, or `fault` (str) where that can't be read.

    living: set of ids.  mounted: name of a hint → (bytes used, bytes there are) where its
    master is mounted in our mount namespace.
    """

    __slots__ = ("fault", "key", "living", "mounted", "record")

    def __init__(self, key, record, fault):
        self.key = key
        self.record = record
        self.fault = fault
        self.living = set()
        self.mounted = {}

    @property
    def id(self):
        return self.record.id if self.record else self.key.partition("-")[2]

    @property
    def stale(self):
        """Nobody of it lives."""
        return self.record is not None and not self.living


def all_pods():
    """Return a `Seen` for each pod, and take away the leftovers of hooks that were killed."""
    store = _store()
    if store is None:
        return []
    with store, Lock(store):
        found = []
        for key in _keys(store):
            try:
                record, fault = _read(store, key), ""
            except StateError as error:
                record, fault = None, error.line()
            if record is None and not fault:
                _remove(store, key)
                continue
            seen = Seen(key, record, fault)
            if record is not None:
                _look(store, seen)
            found.append(seen)
        return found


def _look(store, seen):
    seen.living = {container.id for container in seen.record.living()}
    with store.directory(seen.key) as directory:
        for master in seen.record.masters:
            fd = pod_master.mounted(directory, master)
            if fd is not None:
                status = os.fstatvfs(fd)
                os.close(fd)
                total = status.f_blocks * status.f_frsize
                seen.mounted[master.name] = (total - status.f_bfree * status.f_frsize, total)


def show(pod_id):
    """Return the `Seen` of a pod by its id or key; StateError without one, or with several."""
    found = [seen for seen in all_pods() if pod_id in (seen.key, seen.id)]
    if not found:
        raise StateError("", "", pod_id, "no such pod", hint="sandboxfs pod list shows all")
    if len(found) > 1:
        keys = " or ".join(seen.key for seen in found)
        raise StateError("", "", pod_id, f"is several pods: say {keys}")
    return found[0]


def delete(pod_id, force=False):
    """Take a pod away: masters, record, memory.  StateError while containers of it live.

    force: all the same; they keep the replicas they have, and the memory goes with these.
    """
    key = show(pod_id).key
    with _store() as store, Lock(store):
        if not force:
            _refuse_living(store, key, pod_id)
        _remove(store, key)


def _refuse_living(store, key, pod_id):
    record = _read(store, key)
    living = record.living() if record is not None else []
    if living:
        names = ", ".join(container.id for container in living)
        raise StateError("", "delete", pod_id, f"has living containers: {names}",
                         hint="--force deletes it all the same; they keep the replicas they have")
