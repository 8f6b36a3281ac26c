//! The filter of system calls.
//!
//! Architecture invariant: installed by V as the last thing before it tells that it has started; from then on V makes
//! only calls that the filter allows.

use std::os::fd::{FromRawFd, OwnedFd};

use crate::{LaunchSpec, Layer, Seccomp, Stage};
use nix::errno::Errno;
use seccompiler::{sock_filter, BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::failure::Failure;
use super::policy::{self, Rules, OPENS};

/// linux/seccomp.h.
const SET_MODE_FILTER: libc::c_uint = 1;
const FLAG_NEW_LISTENER: libc::c_ulong = 1 << 3;
const RET_LOG: u32 = 0x7FFC_0000;
const RET_USER_NOTIF: u32 = 0x7FC0_0000;
/// linux/bpf_common.h: "return the constant".
const BPF_RET_K: u16 = 0x06;

/// What is installed, and where its questions arrive if it has any.
pub struct Installed {
    pub layer: Layer,
    pub listener: Option<OwnedFd>,
}

pub fn install(spec: &LaunchSpec) -> Result<Installed, Failure> {
    let wrong = |error: seccompiler::BackendError| {
        Failure::new(Stage::Seccomp, format!("compiling the filter of system calls: {error}"))
    };
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let verdict = if spec.audit { SeccompAction::Log } else { refused };
    let (main, name) = match spec.seccomp {
        Seccomp::None => {
            return Ok(Installed { layer: Layer::Missing("switched off by the launch spec".into()), listener: None })
        }
        list @ (Seccomp::AllowList | Seccomp::AllowListForOwnQemu) => {
            let mut rules = policy::allowed(measured(list)).map_err(wrong)?;
            // In an audit they are asked about, too: Landlock has no audit without denial.
            rules.retain(|call, _| !spec.audit || !OPENS.contains(call));
            let name = if list == Seccomp::AllowList { "allow-list" } else { "our QEMU's allow-list" };
            (compile(rules, verdict, SeccompAction::Allow).map_err(wrong)?, name)
        }
        Seccomp::Gateway => (
            compile(policy::gateway().map_err(wrong)?, verdict, SeccompAction::Allow).map_err(wrong)?,
            "gateway's allow-list",
        ),
        list @ (Seccomp::DenyList | Seccomp::DenyListForRustVmms) => {
            let mut rules = policy::denied().map_err(wrong)?;
            let mut name = "deny-list";
            if list == Seccomp::DenyListForRustVmms {
                policy::permit_rust_vmms(&mut rules).map_err(wrong)?;
                name = "deny-list but for Unix sockets and anonymous files";
            }
            rules.extend(OPENS.iter().filter(|_| spec.audit).map(|call| (*call, Vec::new())));
            (compile(rules, SeccompAction::Allow, verdict).map_err(wrong)?, name)
        }
    };
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let mut unknown = policy::absent();
    if spec.seccomp == Seccomp::DenyListForRustVmms {
        unknown.remove(&libc::SYS_memfd_create);
    }
    let absent = compile(unknown, SeccompAction::Allow, absent).map_err(wrong)?;
    let listener = match (spec.audit, spec.tap) {
        (true, _) => Some(ask_instead(main)?),
        (false, false) => load(&main, 0).map(|_| None)?,
        (false, true) => {
            load(&main, 0)?;
            let opens = policy::opens_for_writing().map_err(wrong)?;
            Some(ask_instead(compile(opens, SeccompAction::Allow, SeccompAction::Log).map_err(wrong)?)?)
        }
    };
    // The later filter's errno wins where both refuse. A gateway asks for nothing of that, and may install no filter.
    if spec.seccomp != Seccomp::Gateway {
        load(&absent, 0)?;
    }
    let how = match (spec.seccomp, spec.audit) {
        (_, true) => "audited: nothing is refused".to_owned(),
        (list @ (Seccomp::AllowList | Seccomp::AllowListForOwnQemu), false) => {
            format!("{} calls, every other one answers EPERM", policy::allowed_count(measured(list)))
        }
        (Seccomp::Gateway, false) => "IP sockets and no files, every other call answers EPERM".to_owned(),
        (_, false) => "what no VMM needs answers EPERM".to_owned(),
    };
    Ok(Installed { layer: Layer::Given(format!("{name}: {how}")), listener })
}

fn measured(list: Seccomp) -> &'static [libc::c_long] {
    match list {
        Seccomp::AllowListForOwnQemu => policy::OWN_QEMU,
        _ => policy::DISTRIBUTIONS,
    }
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    on_match: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, on_match, TargetArch::x86_64)?.try_into()
}

/// Has C asked where the filter says "log". The kernel's own audit log would need the right to read it;
/// seccompiler knows no such action, so its "log" is replaced.
fn ask_instead(mut program: BpfProgram) -> Result<OwnedFd, Failure> {
    for sock_filter { code, k, .. } in &mut program {
        if *code == BPF_RET_K && *k == RET_LOG {
            *k = RET_USER_NOTIF;
        }
    }
    let fd = load(&program, FLAG_NEW_LISTENER)?;
    // SAFETY: the kernel has just made this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// seccomp(2); its answer is 0, or the listener.
fn load(program: &[sock_filter], flags: libc::c_ulong) -> Result<i32, Failure> {
    let length = u16::try_from(program.len())
        .map_err(|_| Failure::new(Stage::Seccomp, format!("a filter of {} instructions is too long", program.len())))?;
    // Both crates lay the kernel's struct sock_filter out as the kernel does.
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: `program` points to `length` instructions; both outlive the call, which copies and does not change them.
    let loaded = unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, std::ptr::from_ref(&program)) };
    match Errno::result(loaded) {
        Ok(answer) => Ok(i32::try_from(answer).unwrap_or(-1)),
        Err(errno) => {
            let way_out = match errno {
                Errno::ENOSYS | Errno::EINVAL => " (this kernel was built without seccomp filters, or is too old)",
                Errno::EBUSY => " (a listener is there already: the launcher itself runs in an audit)",
                _ => "",
            };
            Err(Failure::errno(Stage::Seccomp, errno, format_args!("installing a filter of system calls{way_out}")))
        }
    }
}
