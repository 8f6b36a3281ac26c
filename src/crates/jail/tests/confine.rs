//! The built launcher with a root, a user and filters: what a static program finds when it looks around in there.
//!
//! The program is the launcher itself, which exits at once with 64 when its stdin is no socket, and busybox where a test
//! needs to see more; without busybox (busybox-static) those tests say so and pass over.
#![allow(clippy::unwrap_used)]

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use microvm_jail::{
    Access, Confined, Identity, JailEvent, LaunchSpec, Layer, Seccomp, Stage, Visible, MAX_EVENT_BYTES,
};
use nix::sched::{unshare, CloneFlags};
use nix::sys::socket::{
    recvmsg, sendmsg, setsockopt, socketpair, sockopt, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags,
    SockFlag, SockType,
};

const BUSYBOX: &str = "/bin/busybox";

/// What a launch came to.
struct Outcome {
    output: String,
    confined: Option<Confined>,
    events: Vec<JailEvent>,
}

impl Outcome {
    fn exit_code(&self) -> Option<i32> {
        self.events.iter().find_map(|event| match event {
            JailEvent::Exited { code, .. } => *code,
            _ => None,
        })
    }

    fn failure(&self) -> (Stage, String) {
        let failed = self.events.iter().find_map(|event| match event {
            JailEvent::Failed { stage, message, .. } => Some((*stage, message.clone())),
            _ => None,
        });
        failed.unwrap_or_else(|| panic!("did not fail: {:?} {}", self.events, self.output))
    }
}

/// Starts the launcher under a umask, in octal, with a spec whose stdout and stderr are `output`.
fn launch(mut spec: LaunchSpec, output: UnixStream, umask: &str) -> (Child, OwnedFd) {
    spec.fds = vec![1, 2];
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    setsockopt(&ours, sockopt::PassCred, &true).unwrap();
    let launcher = Command::new("/bin/sh")
        .args(["-c", "umask $1; exec $0", env!("CARGO_BIN_EXE_microvm-jail"), umask])
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env_clear()
        .spawn()
        .unwrap();
    let packet = serde_json::to_vec(&spec).unwrap();
    let fds = [output.as_raw_fd(); 2];
    sendmsg::<()>(
        ours.as_raw_fd(),
        &[IoSlice::new(&packet)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .unwrap();
    (launcher, ours)
}

/// Runs a spec to its end.
fn run(spec: LaunchSpec) -> Outcome {
    run_under("022", spec)
}

fn run_under(umask: &str, spec: LaunchSpec) -> Outcome {
    let (mut output, end) = UnixStream::pair().unwrap();
    let (mut launcher, control) = launch(spec, end, umask);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    let events = events(&control);
    launcher.wait().unwrap();
    let confined = events.iter().find_map(|event| match event {
        JailEvent::Started { confined } => Some(confined.clone()),
        _ => None,
    });
    Outcome { output: text, confined, events }
}

/// The status of a program that sleeps, as the host sees it.
fn status_of(spec: LaunchSpec) -> String {
    let (_output, end) = UnixStream::pair().unwrap();
    let (mut launcher, control) = launch(spec, end, "022");
    let pid = std::iter::from_fn(|| receive(&control)).find_map(|(event, pid)| match event {
        JailEvent::Started { .. } => Some(pid),
        _ => None,
    });
    let pid = pid.unwrap();
    let is_program = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim() == "busybox";
    while !is_program(pid) {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    drop(control);
    launcher.wait().unwrap();
    status
}

/// The next event and its sender's pid; `None` at end-of-file.
fn receive(control: &OwnedFd) -> Option<(JailEvent, i32)> {
    let mut buffer = [0; MAX_EVENT_BYTES];
    let mut ancillary = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(control.as_raw_fd(), &mut slices, Some(&mut ancillary), MsgFlags::empty()).unwrap();
    let (length, pid) = (
        message.bytes,
        message.cmsgs().unwrap().find_map(|cmsg| match cmsg {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
            _ => None,
        }),
    );
    (length > 0).then(|| (serde_json::from_slice(&buffer[..length]).unwrap(), pid.unwrap()))
}

fn events(control: &OwnedFd) -> Vec<JailEvent> {
    std::iter::from_fn(|| receive(control)).map(|(event, _)| event).collect()
}

fn file(host: &str, inside: &str, access: Access) -> Visible {
    Visible::new(Path::new(host).canonicalize().unwrap(), inside, access)
}

/// A busybox script in a root that holds busybox alone, and links to it by no other name. `None` without busybox.
fn script(text: &str) -> Option<LaunchSpec> {
    if !Path::new(BUSYBOX).exists() {
        eprintln!("skipped: needs {BUSYBOX} (busybox-static)");
        return None;
    }
    let argv = ["/bin/busybox", "sh", "-c", text].map(str::to_owned);
    let files = vec![
        file(BUSYBOX, "/bin/busybox", Access::Execute),
        file("/dev/null", "/dev/null", Access::Device),
        file("/etc/passwd", "/data/read", Access::Read),
    ];
    // The shell forks for every command that is not its own.
    Some(LaunchSpec { files, seccomp: Seccomp::None, ..LaunchSpec::new(argv.into()) })
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn test_root_holds_the_named_files_and_nothing_else() {
    let Some(spec) = script("/bin/busybox find / | /bin/busybox sort") else { return };
    let outcome = run(LaunchSpec { landlock: false, ..spec });
    let found: Vec<&str> = outcome.output.lines().collect();
    assert_eq!(found, ["/", "/bin", "/bin/busybox", "/data", "/data/read", "/dev", "/dev/null"]);
}

#[test]
fn test_root_is_open_to_the_vmms_user_whatever_the_umask() {
    let identity = is_root().then_some(Identity { uid: 1_234_567, gid: 1_234_567 });
    for umask in ["000", "022", "077", "777"] {
        let Some(spec) = script("/bin/busybox stat -c %a /bin /data /dev") else { return };
        let outcome = run_under(umask, LaunchSpec { identity, ..spec });
        assert_eq!(outcome.output, "755\n755\n755\n", "{umask}: {:?}", outcome.events);
    }
}

#[test]
fn test_root_and_files_cannot_be_written_even_without_landlock() {
    let text = "echo x > /new; echo x > /data/new; echo x > /data/read; echo x > /dev/null && echo null is fine";
    let Some(spec) = script(text) else { return };
    let output = run(LaunchSpec { landlock: false, ..spec }).output;
    assert_eq!(output.matches("Read-only file system").count(), 3, "{output}");
    assert!(output.contains("null is fine"), "{output}");
}

#[test]
fn test_landlock_denies_what_the_mounts_would_allow() {
    // A file that may be written, but was shown to be read: the mount alone would say the same, so it is a folder here.
    let folder = tempfile::tempdir().unwrap();
    let shown = Visible::new(folder.path().canonicalize().unwrap(), "/folder", Access::Write);
    let Some(mut spec) = script("echo x > /folder/new && echo created") else { return };
    spec.files.push(shown);
    let (with, without) = (run(spec.clone()), run(LaunchSpec { landlock: false, ..spec }));
    assert!(without.output.contains("created"), "{}", without.output);
    if matches!(with.confined.unwrap().landlock, Layer::Given(_)) {
        assert!(with.output.contains("Permission denied"), "{}", with.output);
    }
}

#[test]
fn test_program_has_no_privileges_in_any_set() {
    let Some(spec) = script("/bin/busybox sleep 600") else { return };
    let status = status_of(spec);
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(value(set), "0000000000000000", "{set}");
    }
    assert_eq!((value("NoNewPrivs"), value("Umask"), value("Groups")), ("1".into(), "0077".into(), String::new()));
}

#[test]
fn test_program_has_huge_pages_only_when_it_may() {
    for huge_pages in [true, false] {
        let Some(spec) = script("/bin/busybox sleep 600") else { return };
        let status = status_of(LaunchSpec { huge_pages, ..spec });
        // Kernels before 5.0 do not tell.
        let told = status.lines().find_map(|line| line.strip_prefix("THP_enabled:"));
        assert!(told.is_none_or(|told| (told.trim() == "1") == huge_pages), "{huge_pages}: {told:?}");
    }
}

#[test]
fn test_identity_is_the_only_user_and_needs_root() {
    let Some(spec) = script("/bin/busybox id") else { return };
    let outcome = run(LaunchSpec { identity: Some(Identity { uid: 1_234_567, gid: 7_654_321 }), ..spec });
    if is_root() {
        assert_eq!(outcome.output.trim(), "uid=1234567 gid=7654321");
    } else {
        assert_eq!(outcome.failure().0, Stage::Identity);
    }
}

#[test]
fn test_allow_list_lets_the_launcher_run_and_denies_a_shell_its_forks() {
    let argv = vec!["/jail".to_owned()];
    let files = vec![file(env!("CARGO_BIN_EXE_microvm-jail"), "/jail", Access::Execute)];
    if is_static(env!("CARGO_BIN_EXE_microvm-jail")) {
        assert_eq!(run(LaunchSpec { files, ..LaunchSpec::new(argv) }).exit_code(), Some(64));
    }
    let Some(spec) = script("/bin/busybox true; echo $?; (echo sub); echo end") else { return };
    let outcome = run(LaunchSpec { seccomp: Seccomp::AllowList, ..spec });
    assert!(outcome.output.contains("can't fork: Operation not permitted"), "{}", outcome.output);
}

#[test]
fn test_deny_list_refuses_the_same_dangers() {
    let Some(spec) = script("/bin/busybox true; echo end") else { return };
    let outcome = run(LaunchSpec { seccomp: Seccomp::DenyList, ..spec });
    assert!(outcome.output.contains("can't fork: Operation not permitted"), "{}", outcome.output);
}

#[test]
fn test_rust_vmms_make_unix_sockets_and_no_others() {
    // The first binds /dev/log, which its read-only root does not take.
    for (program, expected) in
        [("syslogd -n -O /dev/null", "Read-only file system"), ("nc 127.0.0.1 9", "Operation not permitted")]
    {
        let Some(spec) = script(&format!("exec /bin/busybox {program}")) else { return };
        let outcome = run(LaunchSpec { seccomp: Seccomp::DenyListForRustVmms, ..spec });
        assert!(outcome.output.contains(expected), "{program}: {}", outcome.output);
    }
}

/// A network namespace of this thread's own with taps of these users in it; `None` where none can be made.
fn taps(taps: &[(&str, u32)]) -> Option<()> {
    if !is_root() || !Path::new("/dev/net/tun").exists() || unshare(CloneFlags::CLONE_NEWNET).is_err() {
        eprintln!("skipped: needs root, /dev/net/tun and network namespaces");
        return None;
    }
    for (name, owner) in taps {
        let arguments = ["tuntap", "add", "dev", name, "mode", "tap", "user", &owner.to_string()];
        let made = Command::new("ip").env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(arguments).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    }
    Some(())
}

fn is_interface(name: &str) -> bool {
    // The thread's own: /proc/net is the main thread's.
    std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains(&format!("{name}:"))
}

/// A busybox applet in place of a VMM that finds its tap by name, with a network namespace of its own.
fn by_name(applet: &[&str], audit: bool) -> Option<Outcome> {
    let spec = script("")?;
    let argv = std::iter::once("/bin/busybox").chain(applet.iter().copied()).map(str::to_owned).collect();
    let identity = Some(Identity { uid: 1_234_567, gid: 1_234_567 });
    let seccomp = Seccomp::DenyListForRustVmms;
    Some(run(LaunchSpec { argv, identity, seccomp, tap: true, audit, ..spec }))
}

#[test]
fn test_tap_is_found_by_name_from_a_network_namespace_of_its_own() {
    for audit in [false, true] {
        let Some(()) = taps(&[("mine", 1_234_567), ("other", 7_654_321)]) else { return };
        // It opens the device, attaches to the tap, and has it end with its descriptor.
        let Some(outcome) = by_name(&["tunctl", "-d", "mine"], audit) else { return };
        assert!(outcome.output.contains("Set 'mine' nonpersistent"), "{} {:?}", outcome.output, outcome.events);
        assert!(!is_interface("mine") && is_interface("other"));
        let others = by_name(&["tunctl", "-d", "other"], audit).unwrap().output;
        assert!(others.contains("Operation not permitted"), "{others}");
        let new = by_name(&["tunctl", "-t", "new"], audit).unwrap().output;
        assert!(new.contains("Operation not permitted") && !is_interface("new"), "{new}");
    }
}

#[test]
fn test_tap_is_handed_to_the_usual_opening_alone() {
    let Some(()) = taps(&[]) else { return };
    let open = |how: &str| by_name(&["sh", "-c", &format!("exec 3{how}; echo opened")], false);
    // Its root has no such file; the first opens for reading, the second may create.
    for how in ["</dev/net/tun", "<>/dev/net/tun", "<>/dev/net/../net/tun"] {
        let Some(outcome) = open(how) else { return };
        assert!(!outcome.output.contains("opened"), "{how}: {}", outcome.output);
    }
    assert!(open("<>/dev/null").unwrap().output.contains("opened"));
}

#[test]
fn test_folder_for_sockets_takes_files_only_where_it_is_said() {
    for (access, takes_files) in [(Access::Sockets, false), (Access::Folder, true)] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("there"), "old\n").unwrap();
        let text =
            "read was </run/there; echo $was; echo new >/run/there; read is </run/there; echo $is; echo x >/run/made";
        let Some(mut spec) = script(text) else { return };
        spec.files.push(file(&folder.path().display().to_string(), "/run", access));
        let outcome = run(spec);
        let made = folder.path().join("made").exists();
        assert!(outcome.output.starts_with("old\nnew\n"), "{}", outcome.output);
        assert_eq!(made, takes_files, "{}", outcome.output);
        assert_eq!(outcome.output.contains("/run/made: Permission denied"), !takes_files, "{}", outcome.output);
    }
}

#[test]
fn test_audit_refuses_nothing_and_tells_each_thing_once() {
    let Some(spec) = script("(echo one); (echo two); echo end") else { return };
    let outcome = run(LaunchSpec { seccomp: Seccomp::AllowList, audit: true, ..spec });
    assert_eq!(outcome.output, "one\ntwo\nend\n");
    let told: Vec<&str> = outcome
        .events
        .iter()
        .filter_map(|event| match event {
            JailEvent::WouldDeny { what, .. } => Some(what.as_str()),
            _ => None,
        })
        .collect();
    assert!(told.iter().any(|what| what.contains("fork") || what.contains("clone")), "{told:?}");
    let mut distinct = told.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), told.len());
}

#[test]
fn test_audit_tells_what_landlock_would_have_denied() {
    let Some(spec) = script("echo x > /data/read; : < /data/read; : < /dev; echo end") else { return };
    let outcome = run(LaunchSpec { seccomp: Seccomp::AllowList, audit: true, ..spec });
    assert!(outcome.output.ends_with("end\n"), "{}", outcome.output);
    let by_landlock: Vec<&str> = outcome
        .events
        .iter()
        .filter_map(|event| match event {
            JailEvent::WouldDeny { layer, what } if layer == "landlock" => Some(what.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(by_landlock, ["writing /data/read", "reading /dev"]);
}

#[test]
fn test_missing_file_fails_in_root_with_both_names() {
    let mut spec = LaunchSpec::new(vec!["/vmm".into()]);
    spec.files.push(Visible::new("/no/such/file", "/vmm", Access::Execute));
    let (stage, message) = run(spec).failure();
    assert_eq!(stage, Stage::Root);
    assert!(message.contains("/no/such/file") && message.contains("/vmm"), "{message}");
}

fn is_static(path: &str) -> bool {
    let needed = Command::new("ldd").arg(path).output().unwrap();
    !needed.status.success() || String::from_utf8_lossy(&needed.stdout).contains("statically linked")
}
