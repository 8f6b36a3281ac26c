//! The built launcher, real processes, real namespaces.
//!
//! Every test ends in `Jail::finish`, or in `Drop`, which both wait until the launcher and its supervisor are gone.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use microvm_jail::{
    JailEvent, JailRequest, LaunchSpec, Namespaces, Resource, Rlimit, Seccomp, Stage, MAX_EVENT_BYTES, SETUP_FAILED,
};
use nix::poll::{poll, PollFd, PollFlags};
use nix::sys::socket::{
    recvmsg, sendmsg, setsockopt, socketpair, sockopt, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags,
    SockFlag, SockType,
};

const DEADLINE: Duration = Duration::from_secs(10);

/// A launcher and the manager's end of its control socket.
struct Jail {
    child: Child,
    control: Option<OwnedFd>,
    reaped: Option<ExitStatus>,
}

impl Jail {
    fn spawn(process_group: Option<i32>) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        setsockopt(&ours, sockopt::PassCred, &true).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_microvm-jail"));
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null()).env_clear();
        if let Some(group) = process_group {
            command.process_group(group);
        }
        Self { child: command.spawn().unwrap(), control: Some(ours), reaped: None }
    }

    fn launch(spec: &LaunchSpec, fds: &[RawFd]) -> Self {
        let jail = Self::spawn(None);
        jail.send(&serde_json::to_vec(spec).unwrap(), fds);
        jail
    }

    /// Launches and waits for the VMM: the jail, the supervisor's pid, the VMM's pid.
    fn started(spec: &LaunchSpec, fds: &[RawFd]) -> (Self, i32, i32) {
        let jail = Self::launch(spec, fds);
        let (event, supervisor) = jail.event().unwrap();
        assert_eq!(event, JailEvent::Supervising);
        let (event, vmm) = jail.event().unwrap();
        assert!(matches!(event, JailEvent::Started { .. }), "{event:?}");
        (jail, supervisor, vmm)
    }

    fn control(&self) -> &OwnedFd {
        self.control.as_ref().unwrap()
    }

    fn send(&self, packet: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let slices = [IoSlice::new(packet)];
        sendmsg::<()>(self.control().as_raw_fd(), &slices, rights, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    }

    fn signal(&self, signal: i32) {
        self.send(&serde_json::to_vec(&JailRequest { signal }).unwrap(), &[]);
    }

    /// The next event and its sender's pid; `None` at end-of-file.
    fn event(&self) -> Option<(JailEvent, i32)> {
        let mut ready = [PollFd::new(self.control().as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, 10_000u16).unwrap(), 1, "no event within 10 s");
        let mut buffer = [0; MAX_EVENT_BYTES];
        let mut ancillary = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let fd = self.control().as_raw_fd();
        let message = recvmsg::<()>(fd, &mut slices, Some(&mut ancillary), MsgFlags::empty()).unwrap();
        let length = message.bytes;
        if length == 0 {
            return None;
        }
        let pid = message.cmsgs().unwrap().find_map(|cmsg| match cmsg {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
            _ => None,
        });
        Some((serde_json::from_slice(&buffer[..length]).unwrap(), pid.expect("SO_PASSCRED is set")))
    }

    fn events(&self) -> Vec<JailEvent> {
        std::iter::from_fn(|| self.event()).map(|(event, _)| event).collect()
    }

    fn failure(&self) -> (Stage, i32, String) {
        match self.event() {
            Some((JailEvent::Failed { stage, errno, message }, _)) => (stage, errno, message),
            other => panic!("not a failure: {other:?}"),
        }
    }

    /// Waits for the launcher's exit.
    fn finish(&mut self) -> ExitStatus {
        let give_up = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.reaped = Some(status);
                return status;
            }
            assert!(Instant::now() < give_up, "the launcher did not exit");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        drop(self.control.take());
        if self.reaped.is_none() {
            self.child.wait().unwrap();
        }
    }
}

fn pipe() -> (File, File) {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (reader.into(), writer.into())
}

/// Programs of the host, as they are: without a root of their own, and free to fork.
fn spec(argv: &[&str]) -> LaunchSpec {
    LaunchSpec {
        new_root: false,
        landlock: false,
        seccomp: Seccomp::None,
        env: vec![("PATH".into(), "/usr/bin:/bin:/usr/sbin:/sbin".into())],
        ..LaunchSpec::new(argv.iter().map(ToString::to_string).collect())
    }
}

fn sleeper() -> LaunchSpec {
    spec(&["/bin/sleep", "600"])
}

/// Runs a program to its end with stdout and stderr in a pipe; what it wrote, and the events.
fn output_of(mut spec: LaunchSpec) -> (String, Vec<JailEvent>) {
    let (reader, writer) = pipe();
    spec.fds = vec![1, 2];
    let mut jail = Jail::launch(&spec, &[writer.as_raw_fd(), writer.as_raw_fd()]);
    drop(writer);
    let mut output = String::new();
    let mut reader = reader;
    reader.read_to_string(&mut output).unwrap();
    let events = jail.events();
    jail.finish();
    (output, events)
}

fn exited(code: i32) -> JailEvent {
    JailEvent::Exited { code: Some(code), signal: None }
}

fn killed(signal: i32) -> JailEvent {
    JailEvent::Exited { code: None, signal: Some(signal) }
}

fn assert_all_events_until(events: &[JailEvent], end: &JailEvent) {
    assert!(matches!(events, [JailEvent::Supervising, JailEvent::Started { .. }, last] if last == end), "{events:?}");
}

/// The process's state letter, `None` once it is gone. A zombie nobody reaps counts as gone: it runs nothing.
fn state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next().filter(|state| !matches!(state, 'Z' | 'X'))
}

fn wait_until_gone(pid: i32, within: Duration) {
    let give_up = Instant::now() + within;
    while state(pid).is_some() {
        assert!(Instant::now() < give_up, "process {pid} is still there after {within:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `Started` comes from before exec; waits until the process is the program.
fn wait_until_executed(pid: i32, name: &str) {
    let give_up = Instant::now() + DEADLINE;
    while std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim() != name {
        assert!(Instant::now() < give_up, "process {pid} did not become {name}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: kill takes two integers.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[test]
fn test_launch_of_short_program_reports_every_step_and_its_code() {
    let mut jail = Jail::launch(&spec(&["/bin/sh", "-c", "exit 7"]), &[]);
    assert_all_events_until(&jail.events(), &exited(7));
    assert_eq!(jail.finish().code(), Some(7));
}

#[test]
fn test_credentials_of_events_are_the_host_pids() {
    let (jail, supervisor, vmm) = Jail::started(&sleeper(), &[]);
    wait_until_executed(vmm, "sleep");
    let status = std::fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    let parent = format!("PPid:\t{supervisor}\n");
    assert!(status.contains(&parent), "{status}");
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
    let numbers = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
    assert_eq!(numbers, format!("NSpid:\t{vmm}\t2"));
    let status = std::fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap();
    assert!(status.contains(&format!("PPid:\t{}\n", jail.child.id())), "{status}");
    assert!(status.contains(&format!("NSpid:\t{supervisor}\t1\n")), "{status}");
}

#[test]
fn test_passed_descriptors_arrive_at_their_numbers_and_no_others() {
    // ls itself opens the lowest free number for the listing: 3.
    let (reader, writer) = pipe();
    let other = File::open("/dev/zero").unwrap();
    let mut spec = spec(&["/bin/ls", "-l", "/proc/self/fd/"]);
    spec.namespaces = Namespaces::NONE;
    spec.fds = vec![9, 1, 4];
    // Leaked on purpose: a descriptor without close-on-exec, as a careless manager may have one.
    let leaked: RawFd = nix::fcntl::fcntl(&other, nix::fcntl::FcntlArg::F_DUPFD(77)).unwrap();
    let jail = Jail::launch(&spec, &[other.as_raw_fd(), writer.as_raw_fd(), other.as_raw_fd()]);
    // SAFETY: fcntl made it, nothing else owns it.
    drop(unsafe { OwnedFd::from_raw_fd(leaked) });
    drop(writer);
    let mut listing = String::new();
    let mut reader = reader;
    reader.read_to_string(&mut listing).unwrap();
    assert_all_events_until(&jail.events(), &exited(0));
    let found: Vec<&str> =
        listing.lines().filter_map(|line| line.split_once(':')?.1.split_once(' ')).map(|x| x.1).collect();
    let open = |fd: &str, target: &str| found.iter().any(|link| link.starts_with(&format!("{fd} -> {target}")));
    assert_eq!(found.len(), 6, "{listing}");
    assert!(open("0", "/dev/null") && open("1", "pipe:") && open("2", "/dev/null"), "{listing}");
    assert!(open("4", "/dev/zero") && open("9", "/dev/zero") && open("3", "/proc/"), "{listing}");
}

#[test]
fn test_audit_with_many_passed_descriptors_starts_and_answers() {
    // More than what the launcher opens itself: its own would have had these numbers.
    let zero = File::open("/dev/zero").unwrap();
    let fds: Vec<i32> = (3..40).collect();
    for list in [Seccomp::AllowList, Seccomp::DenyList] {
        let spec = LaunchSpec { fds: fds.clone(), audit: true, seccomp: list, ..spec(&["/bin/ls", "/proc/self/fd/"]) };
        let jail = Jail::launch(&spec, &vec![zero.as_raw_fd(); fds.len()]);
        let events = jail.events();
        assert!(matches!(events[..2], [JailEvent::Supervising, JailEvent::Started { .. }]), "{events:?}");
        assert_eq!(events.last(), Some(&exited(0)), "{events:?}");
    }
}

#[test]
fn test_swapped_descriptors_do_not_overwrite_each_other() {
    let (in_reader, in_writer) = pipe();
    let (mut out_reader, out_writer) = pipe();
    let mut spec = spec(&["/bin/cat"]);
    spec.fds = vec![1, 0];
    let jail = Jail::launch(&spec, &[out_writer.as_raw_fd(), in_reader.as_raw_fd()]);
    drop((in_reader, out_writer));
    std::io::Write::write_all(&mut &in_writer, b"through").unwrap();
    drop(in_writer);
    let mut text = String::new();
    out_reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
    assert_all_events_until(&jail.events(), &exited(0));
}

#[test]
fn test_killed_vmm_is_reported_with_its_signal() {
    let (mut jail, _, vmm) = Jail::started(&sleeper(), &[]);
    kill(vmm, libc::SIGKILL);
    assert_eq!(jail.events(), [killed(9)]);
    assert_eq!(jail.finish().code(), Some(128 + 9));
}

#[test]
fn test_requested_signals_reach_the_vmm() {
    for signal in [libc::SIGTERM, libc::SIGRTMIN() + 3] {
        let (jail, _, vmm) = Jail::started(&sleeper(), &[]);
        wait_until_executed(vmm, "sleep");
        jail.signal(signal);
        assert_eq!(jail.events(), [killed(signal)]);
    }
}

#[test]
fn test_stopped_vmm_is_not_reported_as_ended() {
    let (jail, _, vmm) = Jail::started(&sleeper(), &[]);
    wait_until_executed(vmm, "sleep");
    jail.signal(libc::SIGSTOP);
    let give_up = Instant::now() + DEADLINE;
    while state(vmm) != Some('T') {
        assert!(Instant::now() < give_up);
        std::thread::sleep(Duration::from_millis(2));
    }
    jail.signal(libc::SIGCONT);
    jail.signal(libc::SIGTERM);
    assert_eq!(jail.events(), [killed(libc::SIGTERM)]);
}

#[test]
fn test_impossible_request_fails_the_jail_and_kills_the_vmm() {
    for packet in [&br#"{"signal":0}"#[..], b"{", br#"{"signal":9,"to":1}"#] {
        let (mut jail, _, vmm) = Jail::started(&sleeper(), &[]);
        jail.send(packet, &[]);
        let (stage, errno, _) = jail.failure();
        assert_eq!((stage, errno), (Stage::Supervise, 0));
        assert_eq!(jail.events(), [killed(9)]);
        jail.finish();
        assert_eq!(state(vmm), None);
    }
}

#[test]
fn test_closing_control_kills_the_vmm_within_a_second() {
    for namespaces in [Namespaces::ALL, Namespaces::NONE] {
        let (mut jail, supervisor, vmm) = Jail::started(&LaunchSpec { namespaces, ..sleeper() }, &[]);
        wait_until_executed(vmm, "sleep");
        drop(jail.control.take());
        wait_until_gone(vmm, Duration::from_secs(1));
        assert_eq!(jail.finish().code(), Some(128 + 9));
        assert_eq!(state(supervisor), None);
    }
}

#[test]
fn test_half_closed_control_kills_the_vmm_and_still_reports_it() {
    let (mut jail, _, _) = Jail::started(&sleeper(), &[]);
    nix::sys::socket::shutdown(jail.control().as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
    assert_eq!(jail.events(), [killed(9)]);
    jail.finish();
}

#[test]
fn test_closing_control_with_unread_events_kills_the_vmm() {
    let mut jail = Jail::launch(&sleeper(), &[]);
    // Two events wait, unread: the launcher's end then reads ECONNRESET, not end-of-file.
    let mut ready = [PollFd::new(jail.control().as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut ready, 10_000u16).unwrap(), 1);
    drop(jail.control.take());
    let code = jail.finish().code();
    assert!([Some(128 + 9), Some(SETUP_FAILED)].contains(&code), "{code:?}");
}

#[test]
fn test_killed_supervisor_takes_the_vmm_along() {
    for namespaces in [Namespaces::ALL, Namespaces::NONE] {
        let (mut jail, supervisor, vmm) = Jail::started(&LaunchSpec { namespaces, ..sleeper() }, &[]);
        wait_until_executed(vmm, "sleep");
        kill(supervisor, libc::SIGKILL);
        wait_until_gone(vmm, Duration::from_secs(1));
        assert_eq!(jail.events(), []);
        assert_eq!(jail.finish().code(), Some(128 + 9));
    }
}

#[test]
fn test_killed_launcher_leaves_the_jail_on_its_lifeline() {
    // The supervisor loses its parent; without this it would be left to whoever reaps orphans here, or does not.
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let (mut jail, supervisor, vmm) = Jail::started(&sleeper(), &[]);
    wait_until_executed(vmm, "sleep");
    jail.child.kill().unwrap();
    assert_eq!(jail.finish().signal(), Some(9));
    assert!(state(vmm).is_some());
    drop(jail.control.take());
    wait_until_gone(vmm, Duration::from_secs(1));
    let supervisor = nix::unistd::Pid::from_raw(supervisor);
    let ended = nix::sys::wait::waitpid(supervisor, None).unwrap();
    assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(supervisor, 128 + 9));
}

#[test]
fn test_terminal_signals_do_not_end_the_jail() {
    let (jail, supervisor, vmm) = Jail::started(&sleeper(), &[]);
    wait_until_executed(vmm, "sleep");
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        kill(jail.child.id().try_into().unwrap(), signal);
        kill(supervisor, signal);
    }
    jail.signal(libc::SIGUSR1);
    assert_eq!(jail.events(), [killed(libc::SIGUSR1)]);
}

#[test]
fn test_vmm_has_a_session_of_its_own_and_default_signals() {
    let (jail, supervisor, vmm) = Jail::started(&sleeper(), &[]);
    wait_until_executed(vmm, "sleep");
    let session = |pid: i32| nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid))).unwrap().as_raw();
    assert_eq!(session(vmm), vmm);
    assert_eq!(session(supervisor), supervisor);
    let launcher = i32::try_from(jail.child.id()).unwrap();
    assert_eq!(session(launcher), launcher);
    let status = std::fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    for mask in ["SigBlk", "SigIgn"] {
        assert!(status.contains(&format!("{mask}:\t0000000000000000\n")), "{status}");
    }
}

#[test]
fn test_launcher_that_leads_a_group_already_still_launches() {
    let jail = Jail::spawn(Some(0));
    jail.send(&serde_json::to_vec(&spec(&["/bin/true"])).unwrap(), &[]);
    assert_all_events_until(&jail.events(), &exited(0));
}

#[test]
fn test_children_of_the_vmm_die_with_it() {
    for namespaces in [Namespaces::ALL, Namespaces::NONE] {
        let (mut reader, writer) = pipe();
        let mut spec = spec(&["/bin/sh", "-c", "sleep 600 & sleep 600"]);
        spec.namespaces = namespaces;
        spec.fds = vec![1];
        let (mut jail, _, vmm) = Jail::started(&spec, &[writer.as_raw_fd()]);
        drop(writer);
        wait_until_executed(vmm, "sh");
        kill(vmm, libc::SIGKILL);
        assert_eq!(jail.events(), [killed(9)]);
        jail.finish();
        // End-of-file: nobody holds the pipe any more.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn test_orphans_in_the_pid_namespace_are_reaped() {
    let script = "(sleep 0 & sleep 0 &) ; sleep 0.2; ls -d /proc/[0-9]*/exe >/dev/null; exit 3";
    let mut jail = Jail::launch(&spec(&["/bin/sh", "-c", script]), &[]);
    assert_all_events_until(&jail.events(), &exited(3));
    jail.finish();
}

#[test]
fn test_missing_program_fails_in_exec_after_started() {
    let mut jail = Jail::launch(&spec(&["/no/such/vmm"]), &[]);
    assert_eq!(jail.event().unwrap().0, JailEvent::Supervising);
    // Not to be trusted until something other than `Failed` follows: it is sent right before exec.
    assert!(matches!(jail.event().unwrap().0, JailEvent::Started { .. }));
    let (stage, errno, message) = jail.failure();
    assert_eq!((stage, errno), (Stage::Exec, libc::ENOENT));
    assert!(message.contains("/no/such/vmm"), "{message}");
    assert_eq!(jail.events(), [exited(SETUP_FAILED)]);
    assert_eq!(jail.finish().code(), Some(SETUP_FAILED));
}

#[test]
fn test_net_namespace_has_only_a_loopback_that_is_down() {
    let (devices, events) = output_of(spec(&["/bin/cat", "/proc/self/net/dev"]));
    assert_all_events_until(&events, &exited(0));
    let names: Vec<&str> = devices.lines().skip(2).map(|line| line.split(':').next().unwrap().trim()).collect();
    assert_eq!(names, ["lo"], "{devices}");
    // A loopback that is down has no route to itself.
    let (routes, _) = output_of(spec(&["/bin/cat", "/proc/self/net/fib_trie"]));
    assert!(!routes.contains("127.0.0.1"), "{routes}");
}

#[test]
fn test_every_namespace_is_new_when_asked_and_inherited_when_not() {
    let kinds = ["pid_for_children", "mnt", "net", "ipc", "uts", "user"];
    let own = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    for (namespaces, expect_new) in [(Namespaces::ALL, true), (Namespaces::NONE, false)] {
        let (_jail, _, vmm) = Jail::started(&LaunchSpec { namespaces, ..sleeper() }, &[]);
        for kind in kinds {
            let theirs = std::fs::read_link(format!("/proc/{vmm}/ns/{kind}")).unwrap();
            assert_eq!(theirs != own(kind), expect_new, "{kind}");
        }
    }
}

#[test]
fn test_mounts_are_private() {
    let (_jail, _, vmm) = Jail::started(&sleeper(), &[]);
    let mounts = std::fs::read_to_string(format!("/proc/{vmm}/mountinfo")).unwrap();
    assert!(!mounts.contains(" shared:") && !mounts.contains(" master:"), "{mounts}");
}

#[test]
fn test_user_namespace_maps_only_the_current_user_to_itself() {
    let (_jail, _, vmm) = Jail::started(&sleeper(), &[]);
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{vmm}/{file}")).unwrap();
    let fields = |text: String| text.split_whitespace().map(ToString::to_string).collect::<Vec<_>>();
    let (uid, gid) = (nix::unistd::geteuid().to_string(), nix::unistd::getegid().to_string());
    assert_eq!(fields(read("uid_map")), [uid.clone(), uid, "1".into()]);
    assert_eq!(fields(read("gid_map")), [gid.clone(), gid, "1".into()]);
    assert_eq!(read("setgroups").trim(), "deny");
}

#[test]
fn test_rlimits_are_applied() {
    let mut spec = spec(&["/bin/sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c"]);
    spec.rlimits = vec![
        Rlimit { resource: Resource::Nofile, soft: 123, hard: 234 },
        Rlimit { resource: Resource::Core, soft: 0, hard: 0 },
    ];
    let (text, events) = output_of(spec);
    assert_eq!(text, "123\n234\n0\n");
    assert_all_events_until(&events, &exited(0));
}

#[test]
fn test_rlimits_a_lower_one_of_the_launcher_is_kept() {
    let jail = Jail::spawn(None);
    let lower = libc::rlimit { rlim_cur: 90, rlim_max: 100 };
    // SAFETY: the new limits outlive the call, and the old ones are not asked for.
    let set = unsafe { libc::prlimit(jail.child.id() as i32, libc::RLIMIT_NOFILE, &lower, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    let (mut reader, writer) = pipe();
    let rlimits = vec![Rlimit { resource: Resource::Nofile, soft: 123, hard: 234 }];
    let spec = LaunchSpec { rlimits, fds: vec![1], ..spec(&["/bin/sh", "-c", "ulimit -Sn; ulimit -Hn"]) };
    jail.send(&serde_json::to_vec(&spec).unwrap(), &[writer.as_raw_fd()]);
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "100\n100\n");
    assert_all_events_until(&jail.events(), &exited(0));
}

#[test]
fn test_environment_is_exactly_the_given() {
    let env = vec![("PATH".into(), "/bin".into()), ("A".into(), "b c=d".into())];
    let (text, _) = output_of(LaunchSpec { env, ..spec(&["/usr/bin/env"]) });
    assert_eq!(text, "PATH=/bin\nA=b c=d\n");
}

#[test]
fn test_cwd_is_the_given() {
    let (text, _) = output_of(LaunchSpec { cwd: PathBuf::from("/usr"), ..spec(&["/bin/pwd"]) });
    assert_eq!(text, "/usr\n");
}

#[test]
fn test_missing_cwd_fails_before_started() {
    let jail = Jail::launch(&LaunchSpec { cwd: "/no/such/folder".into(), ..sleeper() }, &[]);
    assert_eq!(jail.event().unwrap().0, JailEvent::Supervising);
    let (stage, errno, message) = jail.failure();
    assert_eq!((stage, errno), (Stage::Cwd, libc::ENOENT));
    assert!(message.contains("/no/such/folder"), "{message}");
    assert_eq!(jail.events(), [exited(SETUP_FAILED)]);
}

#[test]
fn test_supervisor_writes_itself_into_the_cgroup() {
    // A plain file stands in for cgroup.procs, which needs rights this test may not have.
    let procs = tempfile::NamedTempFile::new().unwrap();
    let jail = Jail::launch(&LaunchSpec { cgroup_procs: vec![procs.path().to_owned()], ..spec(&["/bin/true"]) }, &[]);
    let events = jail.events();
    let written = std::fs::read_to_string(&procs).unwrap();
    assert_all_events_until(&events, &exited(0));
    assert_eq!(written, "0");
}

#[test]
fn test_supervisor_is_born_in_a_group_of_the_unified_hierarchy() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" cgroup2 ")).and_then(|line| line.split(' ').nth(1));
    let folder = mount.map(|mount| PathBuf::from(mount).join(format!("jail-test-{}", std::process::id())));
    let Some(folder) = folder.filter(|folder| std::fs::create_dir(folder).is_ok()) else {
        eprintln!("skipped: needs a mounted cgroup2 hierarchy in which this user may make a group");
        return;
    };
    let spec = LaunchSpec { cgroup_procs: vec![folder.join("cgroup.procs")], ..sleeper() };
    let (mut jail, supervisor, vmm) = Jail::started(&spec, &[]);
    let inside = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap();
    drop(jail.control.take());
    jail.finish();
    std::fs::remove_dir(&folder).unwrap();
    assert_eq!(inside, format!("{supervisor}\n{vmm}\n"));
}

#[test]
fn test_missing_cgroup_fails_with_its_path() {
    let mut jail = Jail::launch(&LaunchSpec { cgroup_procs: vec!["/no/cgroup.procs".into()], ..sleeper() }, &[]);
    let (stage, errno, message) = jail.failure();
    assert_eq!((stage, errno), (Stage::Cgroup, libc::ENOENT));
    assert!(message.contains("/no/cgroup.procs"), "{message}");
    assert_eq!(jail.events(), []);
    assert_eq!(jail.finish().code(), Some(SETUP_FAILED));
}

#[test]
fn test_malformed_spec_fails_in_spec() {
    let packets = [
        ("{", "not valid"),
        (r#"{"argv":["/bin/true"],"uid":0}"#, "unknown field `uid`"),
        (r#"{"argv":["true"]}"#, "not absolute"),
        (r#"{"argv":["/bin/true"],"fds":[5]}"#, "0 descriptors came"),
        (r#"{"argv":["/bin/true"],"rlimits":[{"resource":"fsiz","soft":0,"hard":0}]}"#, "unknown variant `fsiz`"),
    ];
    for (packet, expected) in packets {
        let mut jail = Jail::spawn(None);
        jail.send(packet.as_bytes(), &[]);
        let (stage, errno, message) = jail.failure();
        assert_eq!((stage, errno), (Stage::Spec, 0));
        assert!(message.contains(expected), "{message}");
        assert_eq!(jail.events(), []);
        assert_eq!(jail.finish().code(), Some(SETUP_FAILED));
    }
}

#[test]
fn test_control_closed_before_the_spec_ends_the_launcher() {
    let mut jail = Jail::spawn(None);
    drop(jail.control.take());
    assert_eq!(jail.finish().code(), Some(SETUP_FAILED));
}

#[test]
fn test_start_by_hand_is_explained() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_microvm-jail")).stdin(Stdio::null()).stdout(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("started by the microVM manager"));
}
