"""
The self-test at start refuses a kernel that moves bytes wrongly; here the program is what is wrong.
"""

import errno
import gc
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.tools import REPOSITORY, find_program

from bpfprog import KernelError, Splice
from controller.router.loop import Loop
from controller.router.relay import RelayHandoff
from controller.router.selftest import SelfTestFailed, prove
from controller.router.sockmap import SockmapHandoff

SOURCE = REPOSITORY / "bpfprog"
LIMIT = 1024 * 1024

NO_DROP = [
    ("\tif (!skb->len)\n\t\treturn SK_DROP;\n", ""),
    ("\tif (len <= 0)\n\t\treturn SK_DROP;\n", ""),
]
NO_LIMIT = ("\tif (queued + len > limit)\n\t\treturn pass(count, done, slot, len);\n", "")
NO_ROOM = (
    "\tif (room < (int)queued + len)\n\t\treturn pass(count, done, slot, len);\n",
    "",
)
REDIRECT = "\treturn bpf_sk_redirect_hash(skb, &sockets, &peer, 0);\n"
BEGIN = "\t__u64 self = bpf_get_socket_cookie(skb);\n"

Mutation = tuple[str, str]
Compile = Callable[..., Path]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """
    Compile the program with replacements of its text, each of which must find its place.
    """

    def compile_with(*mutations: Mutation) -> Path:
        text = (SOURCE / "splice.bpf.c").read_text()
        for old, new in mutations:
            assert text.count(old) == 1, f"not once in the program: {old!r}"
            text = text.replace(old, new)
        source = tmp_path / "mutated.bpf.c"
        source.write_text(text)
        headers = f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}"
        clang = find_program("clang", "clang")
        flags = ("-O2", "-g", "-mcpu=v3", "-target", "bpf", f"-I{headers}", f"-I{SOURCE}")
        subprocess.run(
            [clang, *flags, "-Wno-unused", "-c", source, "-o", source.with_suffix(".o")],
            check=True,
        )
        return source.with_suffix(".o")

    return compile_with


def verdict(program: Path) -> str:
    """
    Run the self-test on *program*; empty when it passes, else why not.
    """
    loop = Loop()
    with Splice(program) as splice:
        try:
            prove(loop, SockmapHandoff(loop, splice, LIMIT))
        except SelfTestFailed as refusal:
            return str(refusal)
    return ""


def test_the_program_as_it_is_passes(compiled: Compile) -> None:
    """
    What we ship is proven on this kernel.
    """
    assert verdict(compiled()) == ""


def test_the_relay_passes() -> None:
    """
    The hand-off that is always there is proven by the same test.
    """
    loop = Loop()

    prove(loop, RelayHandoff(loop))


@pytest.mark.parametrize(
    ("mutations", "reason"),
    [
        ([NO_LIMIT, NO_ROOM], "bound: "),
        ([(BEGIN, BEGIN + "\treturn SK_DROP;\n")], "kick: "),
        (NO_DROP, "half-close: "),
        ([(REDIRECT, "\treturn SK_DROP;\n")], "kick: "),
        # the first segment goes, the later ones are lost
        (
            [(REDIRECT, "\tif (count->redirected > 100000)\n\t\treturn SK_DROP;\n" + REDIRECT)],
            ("drain: ", "hash: ", "half-close: "),
        ),
        ([("\tcount->redirected += len;\n", "")], ("drain: ", "half-close: ", "bound: ")),
    ],
    ids=[
        "no bound",
        "all dropped",
        "lone FIN redirected",
        "dropped in place of redirected",
        "some dropped",
        "redirects not counted",
    ],
)
def test_a_wrong_program_is_refused(
    mutations: list[Mutation], reason: str | tuple[str, ...], compiled: Compile
) -> None:
    """
    A hand-off that loses, keeps or mixes up bytes is refused, and the reason says what it did.
    """
    assert verdict(compiled(*mutations)).startswith(reason)


def test_what_the_verifier_refuses_is_told_whole(compiled: Compile) -> None:
    """
    A program that the kernel does not take is a KernelError with its errno and the verifier's log.
    """
    unchecked = compiled(("\tif (!dst)\n\t\treturn pass(count, done, slot, len);\n", ""))

    with pytest.raises(KernelError) as refused:
        Splice(unchecked)

    notes = "\n".join(refused.value.__notes__)
    assert refused.value.errno == errno.EACCES
    assert str(refused.value) == "[Errno 13] load the BPF program: Permission denied"
    assert "bpf_skc_to_tcp_sock" in notes
    assert "BEGIN PROG LOAD LOG" in notes


def test_a_missing_object_is_told(tmp_path: Path) -> None:
    """
    Without a compiled program the error says which file is missing.
    """
    with pytest.raises(KernelError, match=r"open gone\.o: No such file") as refused:
        Splice(tmp_path / "gone.o")

    assert refused.value.errno == errno.ENOENT


def test_a_stale_object_is_told(compiled: Compile) -> None:
    """
    An object whose maps are not those of this build is refused before it sees a socket.
    """
    stale = compiled(("\t__type(value, struct direction);\n", "\t__type(value, struct counts);\n"))

    with pytest.raises(KernelError, match=r"stale splice\.bpf\.o: values of 'directions' differ"):
        Splice(stale)


def test_nothing_is_left_behind(compiled: Compile) -> None:
    """
    A refused hand-off leaves no descriptor open.
    """
    program = compiled(NO_LIMIT, NO_ROOM)
    loop = Loop()
    with Splice(program) as splice:
        handoff = SockmapHandoff(loop, splice, LIMIT)
        gc.collect()  # else what earlier tests left may go meanwhile, and be taken for ours
        before = descriptors()
        with pytest.raises(SelfTestFailed):
            prove(loop, handoff)

        assert before == descriptors()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
