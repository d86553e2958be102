//! Lets programs that change their user run where there is only one.
//!
//! An ordinary user without a subordinate range (or without `newuidmap`, which a bare machine lacks) gets a user namespace
//! with one id. A server that starts as root and wants to go on as another user, or gives files away, is refused there and
//! ends. A system call filter answers such calls with success and does nothing: with one id there is nothing to change to,
//! and nothing that another id would protect.
//!
//! Invariants: installed only where exactly one id is mapped; it grants nothing, since it never runs what it answers.

use std::fs;
use std::io;

use crate::ids;

/// Calls that change ids of processes or owners of files.
#[cfg(target_arch = "x86_64")]
const FAKED: [libc::c_long; 13] = [
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
];
#[cfg(not(target_arch = "x86_64"))]
const FAKED: [libc::c_long; 11] = [
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
];

/// Calls of another architecture (32 bits) have other numbers: they are left alone.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURE: u32 = 0;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;

/// Whether the process is in a user namespace with a single id.
pub(crate) fn is_alone() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    matches!(ids::parse_map(&map).as_slice(), [only] if only.count == 1)
}

/// Installs the filter for this process and what it starts. The process must have given up gaining privileges.
pub(crate) fn pretend() -> io::Result<()> {
    let mut filter = program();
    let length = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_mut_ptr() };
    #[expect(unsafe_code, reason = "seccomp filters have no safe wrapper")]
    // SAFETY: the kernel copies the program during the call; it lives until then.
    let done = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program, 0, 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The filter: another architecture, allow; one of [`FAKED`], "success" without doing it; else allow.
fn program() -> Vec<libc::sock_filter> {
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let give = |what| statement(libc::BPF_RET | libc::BPF_K, what);
    let skip_unless = |value| jump(value, 0, 1);
    let mut filter =
        vec![load(ARCH), jump(ARCHITECTURE, 1, 0), give(libc::SECCOMP_RET_ALLOW), load(NUMBER)];
    for number in FAKED {
        filter.push(skip_unless(u32::try_from(number).unwrap_or(u32::MAX)));
        filter.push(give(libc::SECCOMP_RET_ERRNO));
    }
    filter.push(give(libc::SECCOMP_RET_ALLOW));
    filter
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or_default(), jt: 0, jf: 0, k }
}

fn jump(value: u32, jt: u8, jf: u8) -> libc::sock_filter {
    let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    libc::sock_filter { jt, jf, ..statement(code, value) }
}
