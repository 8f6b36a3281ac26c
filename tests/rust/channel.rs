//! The host's end of the channel against peers that are not what they should be, and against a real VM with a tap between.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::{Duration, Instant};

use microvm_isolation::channel::{Agent, Answer, Next, PortConnection, Process};
use microvm_isolation::error::Result;
use microvm_isolation::host::stream_socket::StreamSocket;
use microvm_protocol::frame::{Frame, Kind, MAX_DATA, MAX_PAYLOAD};
use microvm_protocol::mux::{MAX_CALLS, STDOUT, WINDOW};
use microvm_protocol::record;
use serde_json::{json, Value};
use support::{connect, logged, no_key, resident_bytes, Guest, KEY, OTHER_KEY};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

fn details(error: &microvm_isolation::error::Error) -> (&'static str, Value) {
    (error.code(), error.details())
}

#[tokio::test]
async fn test_connect_to_a_peer_with_another_key_is_refused_and_logged() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("wrong-key", OTHER_KEY).await;
    assert_eq!(agent.err().expect("refused").code(), "handshake_failed");
    assert!(guest.is_none());
    assert!(logged("wrong-key", "refused"));
}

#[tokio::test]
async fn test_connect_to_a_peer_without_key_is_refused_and_logged() {
    let _turn = support::turn().await;
    for (name, bytes) in no_key() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes).await.unwrap();
        theirs.shutdown().await.unwrap();
        let agent = support::agent(name, ours).await;
        assert_eq!(agent.err().expect("refused").code(), "handshake_failed", "{name}");
        assert!(logged(name, "refused"), "{name}");
    }
}

#[tokio::test]
async fn test_connect_to_a_recorded_session_is_refused_and_logged() {
    let _turn = support::turn().await;
    let (ours, tapped) = UnixStream::pair().unwrap();
    let mut recorded = Guest::record("first", tapped, async { support::agent("first", ours).await.unwrap() }).await;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&std::mem::take(&mut recorded)).await.unwrap();
    let again = support::agent("replayed", ours).await;
    assert_eq!(again.err().expect("refused").code(), "handshake_failed");
    assert!(logged("replayed", "refused"));
}

#[tokio::test]
async fn test_hostile_bytes_after_the_handshake_end_the_session_and_no_more() {
    let _turn = support::turn().await;
    let record_of = |body: &[u8]| {
        let mut out = Vec::new();
        record::encode(body, &mut out).unwrap();
        out
    };
    let garbage: Vec<u8> = (0..200_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for (name, bytes) in [
        ("garbage", garbage.clone()),
        ("an empty record", vec![0, 0]),
        ("a record that is not sealed", record_of(b"\x02\x01\0\0\0\x01{}")),
        ("a record shorter than its tag", record_of(b"x")),
        ("the longest record of nothing", record_of(&garbage[..record::MAX_BODY])),
    ] {
        let (agent, guest) = connect("hostile", KEY).await;
        let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
        let asked = agent.request("ping", Value::Null, LONG);
        let attack = async {
            guest.hear().await;
            guest.write(&bytes).await;
        };
        let (answered, ()) = tokio::join!(asked, attack);
        assert_eq!(details(&answered.unwrap_err()), ("channel_closed", json!({"sent": true})), "{name}");
        let again = agent.request("ping", Value::Null, LONG).await.unwrap_err();
        assert_eq!(details(&again), ("channel_closed", json!({"sent": false})), "{name}");
    }
}

#[tokio::test]
async fn test_hostile_frames_end_the_session_and_no_more() {
    let _turn = support::turn().await;
    let window =
        vec![Some((Kind::Data, false, 1, [&[STDOUT][..], &vec![0; MAX_DATA]].concat())); WINDOW / MAX_DATA + 2];
    let endless = vec![Some((Kind::Response, false, 1, vec![b' '; MAX_PAYLOAD])); 300];
    let rows = [
        ("a response nobody asked for", vec![Some((Kind::Response, true, 77, b"{}".to_vec()))]),
        ("a request", vec![Some((Kind::Request, true, 1, b"{}".to_vec()))]),
        ("a pong nobody asked for", vec![Some((Kind::Pong, false, 9, vec![]))]),
        ("more bytes than the window", window),
        ("more credit than the window", vec![Some((Kind::Credit, false, 1, vec![0, 0xff, 0xff, 0xff, 0xff]))]),
        ("a response without end", endless),
        // None: the last frame once more, byte for byte.
        ("a replay", vec![Some((Kind::Event, false, 0, b"{}".to_vec())), None]),
    ];
    for (name, frames) in rows {
        let (agent, guest) = connect("frames", KEY).await;
        let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
        let before = resident_bytes();
        let asked = agent.request("ping", Value::Null, LONG);
        let attack = async {
            assert_eq!(guest.hear().await.id, 1);
            guest.attack(&frames).await;
        };
        let (answered, ()) = tokio::join!(asked, attack);
        assert_eq!(answered.unwrap_err().code(), "channel_closed", "{name}");
        assert!(resident_bytes() < before + (64 << 20), "{name}");
    }
}

#[tokio::test]
async fn test_hostile_flood_of_what_is_allowed_fills_neither_memory_nor_log() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("flood", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let before = resident_bytes();
    for _ in 0..20_000 {
        guest.say(Kind::Event, false, 0, b"{\"event\":\"nonsense\"}").await;
    }
    let (answered, ()) =
        tokio::join!(agent.request("ping", Value::Null, LONG), guest.answer(b"{\"status\":\"ok\",\"result\":1}"));
    assert_eq!(answered.unwrap(), Answer::Ok { result: json!(1) });
    assert!(resident_bytes() < before + (8 << 20));
    assert!(support::count_logged("flood") <= 8);
}

#[tokio::test]
async fn test_hostile_stream_of_single_bytes_holds_no_more_than_its_window() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("single", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let stream = agent.open("stream", json!({}), LONG).await.unwrap();
    let asked = guest.hear().await.id;
    let before = resident_bytes();
    for number in 0..WINDOW {
        guest.say(Kind::Data, false, asked, &[1 + (number % 2) as u8, 7]).await;
    }
    guest.say(Kind::Response, true, asked, b"{\"status\":\"ok\",\"result\":1}").await;
    let mut heard = 0;
    while let Next::Piece(piece) = stream.next::<Value>().await.unwrap() {
        heard += piece.bytes.len();
    }
    assert_eq!(heard, WINDOW);
    assert!(resident_bytes() < before + (8 << 20));
}

#[tokio::test]
async fn test_hostile_answers_are_errors_of_their_askers() {
    let _turn = support::turn().await;
    let many = format!("{{\"status\":\"ok\",\"result\":[{}0]}}", "[],".repeat(3 << 20));
    let deep = format!("{{\"status\":\"ok\",\"result\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for body in ["", "null", "{\"status\":\"ok\"}", "\u{fffd}", many.as_str(), deep.as_str()] {
        let (agent, guest) = connect("answers", KEY).await;
        let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
        let (answered, ()) = tokio::join!(agent.request("ping", Value::Null, LONG), guest.answer(body.as_bytes()));
        assert_eq!(answered.unwrap_err().code(), "channel_closed");
        let (answered, ()) =
            tokio::join!(agent.request("ping", Value::Null, LONG), guest.answer(b"{\"status\":\"ok\",\"result\":1}"));
        assert!(answered.is_ok());
    }
}

#[tokio::test]
async fn test_guest_that_never_reads_blocks_nobody_and_is_told_from_one_that_never_answers() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("deaf", KEY).await;
    let (agent, guest) = (agent.unwrap(), guest.unwrap());
    let big = json!({"data": "x".repeat(8 << 20)});
    let begun = Instant::now();
    let (first, second) = tokio::join!(agent.request("a", big.clone(), SHORT), agent.request("b", big, SHORT));
    for refused in [first, second] {
        assert_eq!(details(&refused.unwrap_err()), ("channel_timeout", json!({"sent": false})));
    }
    let small = agent.request("c", Value::Null, SHORT).await.unwrap_err();
    assert_eq!(details(&small), ("channel_timeout", json!({"sent": false})));
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(guest);
}

#[tokio::test]
async fn test_guest_that_never_answers_keeps_its_places_and_later_askers_are_not_sent() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("mute", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let reading = tokio::spawn(async move { guest.hear_for_ever().await });
    let asked = (0..MAX_CALLS).map(|_| agent.request("x", Value::Null, SHORT));
    for refused in support::all(asked).await {
        assert_eq!(details(&refused.unwrap_err()), ("channel_timeout", json!({"sent": true})));
    }
    let late = agent.request("x", Value::Null, SHORT).await.unwrap_err();
    assert_eq!(details(&late), ("channel_timeout", json!({"sent": false})));
    reading.abort();
}

#[tokio::test]
async fn test_many_askers_of_one_agent_get_their_own_answers() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("many", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let echo = tokio::spawn(async move { guest.echo_for_ever().await });
    let asked = (0..500u32)
        .map(|n| agent.request("echo", json!({"n": n, "pad": "x".repeat((n as usize * 997) % 60_000)}), LONG));
    for (number, answered) in support::all(asked).await.into_iter().enumerate() {
        let Ok(Answer::Ok { result }) = answered else { panic!("{answered:?}") };
        assert_eq!(result["params"]["n"], number);
    }
    echo.abort();
}

#[tokio::test(start_paused = true)]
async fn test_sign_of_life_a_silent_agent_gives_none_and_any_record_is_one() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("silent", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let silent = agent.sign_of_life(Duration::from_secs(2)).await.unwrap_err();
    assert_eq!(silent.code(), "channel_timeout");
    let ping = guest.hear().await;
    assert_eq!(ping.kind, Kind::Ping);
    let (sign, ()) =
        tokio::join!(agent.sign_of_life(Duration::from_secs(2)), guest.say(Kind::Pong, false, ping.id, b""));
    sign.unwrap();
    drop(guest);
    assert_eq!(agent.sign_of_life(LONG).await.unwrap_err().code(), "channel_closed");
}

#[tokio::test(start_paused = true)]
async fn test_idle_for_counts_from_the_last_use_and_a_probe_is_none() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("idle", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let echo = tokio::spawn(async move { guest.echo_for_ever().await });
    agent.request("echo", json!({}), LONG).await.unwrap();
    let before = agent.idle_for();
    std::thread::sleep(Duration::from_millis(30));
    agent.probe("health", json!({}), LONG).await.unwrap().unwrap();
    assert!(agent.idle_for() >= before + Duration::from_millis(30));
    let open = agent.open("stream", json!({}), LONG).await.unwrap();
    assert_eq!(agent.idle_for(), Duration::ZERO);
    drop(open);
    echo.abort();
}

#[tokio::test]
async fn test_tap_on_the_transport_of_a_real_vm_shows_no_plaintext() {
    let _turn = support::turn().await;
    let vm = support::Tapped::launch("tapped", &support::image()).await;
    let secret = "Xyzzy-plugh-0123456789";
    let params = json!({"program": "/bin/sh", "args": ["-c", format!("echo {secret} | tr a-z A-Z")]});
    let Answer::Ok { result } = vm.agent.request("exec", params, LONG).await.unwrap() else { panic!("exec failed") };
    assert_eq!(result["stdout"], secret.to_uppercase() + "\n");
    let stream = vm.agent.open("stream", json!({"program": "echo", "args": [secret]}), LONG).await.unwrap();
    let process = Process::start(stream, Duration::from_secs(30)).await.unwrap();
    assert_eq!(process.next().await.unwrap().unwrap().bytes, format!("{secret}\n").as_bytes());
    let (to_guest, to_host) = vm.tapped();
    assert!(to_guest.len() > 100 && to_host.len() > 100);
    for bytes in [&to_guest, &to_host] {
        for plain in [secret, &secret.to_uppercase(), "exec", "program", "stdout", "status", "ready", "tapped"] {
            assert!(!bytes.windows(plain.len()).any(|window| window == plain.as_bytes()), "{plain:?} is readable");
        }
    }
    // The records' headers and the prelude are all that can be told from noise.
    assert!(support::looks_random(&to_host[64..]));
}

#[tokio::test]
async fn test_hostile_initramfs_in_a_real_vm_is_refused_and_harms_nothing() {
    let _turn = support::turn().await;
    // A flood of noise; of zeros; a HELLO and then noise; a HELLO without end of others.
    for (name, script) in [
        ("noise", "cat /dev/urandom >$port"),
        ("zeros", "cat /dev/zero >$port"),
        ("hello", "printf '\\0\\7\\1TWMV\\1\\1' >$port; cat /dev/urandom >$port"),
        ("hellos", "while :; do printf '\\0\\7\\1TWMV\\1\\1'; done >$port"),
        ("future", "printf '\\0\\7\\1TWMV\\176\\177' >$port; sleep 1000"),
    ] {
        let before = resident_bytes();
        let image = support::hostile_image(script);
        let refused = support::launch_untapped(name, &image.image).await;
        assert_eq!(refused.err().expect("refused").code(), "handshake_failed", "{name}");
        assert!(logged(name, "refused"), "{name}");
        assert!(resident_bytes() < before + (16 << 20), "{name}");
    }
}

#[tokio::test]
async fn test_pieces_of_any_size_on_the_transport_are_understood() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("split", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let mut sealed = Vec::new();
    let answer = async {
        let asked = guest.hear().await.id;
        let frame = Frame { kind: Kind::Response, last: true, id: asked, payload: b"{\"status\":\"ok\",\"result\":2}" };
        guest.seal(&frame, &mut sealed);
        for byte in &sealed {
            guest.write(std::slice::from_ref(byte)).await;
            tokio::task::yield_now().await;
        }
    };
    let (answered, ()) = tokio::join!(agent.request("ping", Value::Null, LONG), answer);
    assert_eq!(answered.unwrap(), Answer::Ok { result: json!(2) });
}

#[tokio::test]
async fn test_dropped_agent_closes_the_transport_and_wakes_who_waits() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("dropped", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let stream = agent.open("stream", json!({}), LONG).await.unwrap();
    guest.hear().await;
    drop(agent);
    assert_eq!(stream.next::<Value>().await.err().expect("closed").code(), "channel_closed");
    let mut rest = Vec::new();
    guest.stream.read_to_end(&mut rest).await.unwrap();
}

/// A connection to a port, as its three parties see it: the local program, the task that carries, the guest.
async fn port(name: &str) -> (UnixStream, JoinHandle<Result<()>>, Guest, Agent) {
    let (agent, guest) = connect(name, KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    let stream = agent.open("connect", json!({"port": 80}), LONG).await.unwrap();
    let (ours, theirs) = StreamSocket::pair().unwrap();
    let theirs = std::os::unix::net::UnixStream::from(theirs);
    theirs.set_nonblocking(true).unwrap();
    assert_eq!(guest.hear().await.kind, Kind::Request);
    let carried = tokio::spawn(PortConnection::new(stream).carry(ours));
    (UnixStream::from_std(theirs).unwrap(), carried, guest, agent)
}

#[tokio::test]
async fn test_port_connection_ends_each_direction_by_itself() {
    let _turn = support::turn().await;
    for last_alone in [false, true] {
        let (mut local, carried, mut guest, _agent) = port("port").await;
        guest.say(Kind::Started, false, 1, br#"{"started":"connection","address":"127.0.0.1:80"}"#).await;
        guest.say(Kind::Data, !last_alone, 1, b"\x01all").await;
        if last_alone {
            guest.say(Kind::Data, true, 1, b"\x01").await;
        }
        let mut said = String::new();
        local.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "all");
        local.write_all(b"more").await.unwrap();
        local.shutdown().await.unwrap();
        let mut heard = Vec::new();
        loop {
            let frame = guest.hear().await;
            assert_eq!((frame.kind, frame.payload[0]), (Kind::Data, 0));
            heard.extend_from_slice(&frame.payload[1..]);
            if frame.last {
                break;
            }
        }
        assert_eq!(heard, b"more");
        assert!(!carried.is_finished());
        guest.say(Kind::Response, true, 1, br#"{"status":"ok","result":{}}"#).await;
        carried.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn test_port_connection_that_breaks_on_one_side_breaks_on_the_other() {
    let _turn = support::turn().await;
    let (mut local, carried, mut guest, _agent) = port("port-guest").await;
    guest.say(Kind::Data, false, 1, b"\x01part").await;
    guest
        .say(Kind::Response, true, 1, br#"{"status":"error","error":{"code":"connection_reset","message":"m"}}"#)
        .await;
    let mut said = String::new();
    local.read_to_string(&mut said).await.unwrap();
    assert_eq!((said.as_str(), carried.await.unwrap().unwrap_err().code()), ("part", "connection_reset"));

    // A program that is gone is noticed when the guest has something to say to it.
    let (local, carried, mut guest, _agent) = port("port-local").await;
    drop(local);
    assert!(guest.hear().await.last);
    guest.say(Kind::Data, false, 1, b"\x01part").await;
    assert_eq!(guest.hear().await.kind, Kind::Cancel);
    assert_eq!(carried.await.unwrap().unwrap_err().code(), "host_error");
}

#[tokio::test]
async fn test_port_connection_holds_a_window_for_a_program_that_does_not_read() {
    let _turn = support::turn().await;
    let (local, carried, mut guest, _agent) = port("port-slow").await;
    const LENGTH: usize = WINDOW / 8;
    let piece = [&[STDOUT][..], &[7; LENGTH]].concat();
    let (mut credit, mut sent) = (WINDOW, 0);
    loop {
        while credit >= LENGTH {
            guest.say(Kind::Data, false, 1, &piece).await;
            (credit, sent) = (credit - LENGTH, sent + LENGTH);
        }
        // Credit comes for what the socket's buffer took, and for no more.
        assert!(sent < 4 * WINDOW, "{sent}");
        let Ok(frame) = tokio::time::timeout(SHORT, guest.hear()).await else { break };
        assert_eq!((frame.kind, frame.payload[0]), (Kind::Credit, STDOUT));
        credit += u32::from_be_bytes(frame.payload[1..].try_into().unwrap()) as usize;
    }
    assert!(!carried.is_finished());
    drop(local);
    assert_eq!(carried.await.unwrap().unwrap_err().code(), "host_error");
}

#[tokio::test]
async fn test_port_connection_that_is_refused_has_the_guests_code() {
    let _turn = support::turn().await;
    let (agent, guest) = connect("port-refused", KEY).await;
    let (agent, mut guest) = (agent.unwrap(), guest.unwrap());
    for (answer, code) in [
        (&br#"{"status":"error","error":{"code":"connection_refused","message":"m"}}"#[..], "connection_refused"),
        (&br#"{"status":"ok","result":{}}"#[..], "channel_closed"),
    ] {
        let connection = PortConnection::new(agent.open("connect", json!({"port": 80}), LONG).await.unwrap());
        let (made, ()) = tokio::join!(connection.made(LONG), guest.answer(answer));
        assert_eq!(made.unwrap_err().code(), code);
    }
    let connection = PortConnection::new(agent.open("connect", json!({"port": 80}), LONG).await.unwrap());
    let begins = async {
        let id = guest.hear().await.id;
        guest.say(Kind::Started, false, id, br#"{"started":"program","pid":1}"#).await;
    };
    let (made, ()) = tokio::join!(connection.made(LONG), begins);
    assert_eq!(made.unwrap_err().code(), "channel_closed");
    assert_eq!(connection.made(SHORT).await.unwrap_err().code(), "channel_timeout");
}
