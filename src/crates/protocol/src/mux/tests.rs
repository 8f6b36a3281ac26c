use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::frame::{Frame, Kind, MAX_DATA, MAX_PAYLOAD};
use crate::ProtocolError;

/// Two sides and the frames that are on their way between them.
struct Pair {
    host: Mux,
    guest: Mux,
    to_guest: VecDeque<Vec<u8>>,
    to_host: VecDeque<Vec<u8>>,
}

impl Pair {
    fn new() -> Self {
        let (to_guest, to_host) = Default::default();
        Self { host: Mux::new(Role::Host), guest: Mux::new(Role::Guest), to_guest, to_host }
    }

    /// Moves at most one frame each way; what it led to at the host and at the guest. False when nothing moves any more.
    fn step(&mut self, host_in: &mut Vec<Incoming>, guest_in: &mut Vec<Incoming>) -> bool {
        let mut frame = Vec::new();
        if self.host.next_frame(&mut frame) {
            self.to_guest.push_back(frame.clone());
        }
        if self.guest.next_frame(&mut frame) {
            self.to_host.push_back(frame);
        }
        let (down, up) = (self.to_guest.pop_front(), self.to_host.pop_front());
        let moved = down.is_some() || up.is_some();
        guest_in.extend(down.and_then(|frame| self.guest.receive(&frame).unwrap()));
        host_in.extend(up.and_then(|frame| self.host.receive(&frame).unwrap()));
        moved
    }

    fn settle(&mut self) -> (Vec<Incoming>, Vec<Incoming>) {
        let (mut host_in, mut guest_in) = (Vec::new(), Vec::new());
        while self.step(&mut host_in, &mut guest_in) {}
        (host_in, guest_in)
    }

    /// A call whose request the guest has.
    fn opened(&mut self) -> u32 {
        let id = self.host.request(b"{}".to_vec()).unwrap();
        let (_, guest_in) = self.settle();
        assert_eq!(guest_in, [Incoming::Request { id, body: b"{}".to_vec() }]);
        id
    }
}

fn frame(kind: Kind, last: bool, id: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Frame { kind, last, id, payload }.encode(&mut bytes);
    bytes
}

fn kinds(mux: &mut Mux, count: usize) -> Vec<(u8, u32)> {
    let mut out = Vec::new();
    (0..count)
        .map_while(|_| mux.next_frame(&mut out).then(|| Frame::decode(&out).unwrap()).map(|f| (f.kind as u8, f.id)))
        .collect()
}

#[test]
fn test_call_request_and_response_arrive_whole() {
    let mut pair = Pair::new();
    let (question, reply) = (vec![7; 3 * MAX_PAYLOAD + 5], vec![9; MAX_PAYLOAD]);
    let id = pair.host.request(question.clone()).unwrap();
    assert_eq!(pair.settle().1, [Incoming::Request { id, body: question }]);
    pair.guest.respond(id, reply.clone()).unwrap();
    assert_eq!(pair.settle().0, [Incoming::Response { id, body: reply }]);
    assert!(pair.host.is_empty() && pair.guest.is_empty());
}

#[test]
fn test_call_request_without_room_is_refused_when_it_is_whole_and_the_rest_goes_on() {
    let mut pair = Pair::new();
    pair.guest.ask_for_room(|_| false);
    let long = pair.host.request(vec![7; 2 * ROOM_STEP]).unwrap();
    let small = pair.host.request(vec![8; ROOM_STEP / 2]).unwrap();
    let came = pair.settle().1;
    assert_eq!(came.len(), 2);
    assert!(came.contains(&Incoming::Refused { id: long }));
    assert!(came.contains(&Incoming::Request { id: small, body: vec![8; ROOM_STEP / 2] }));
    assert_eq!(pair.guest.assembling, 0);
    pair.guest.respond(long, b"no".to_vec()).unwrap();
    assert_eq!(pair.settle().0, [Incoming::Response { id: long, body: b"no".to_vec() }]);
}

#[test]
fn test_schedule_small_request_overtakes_a_long_one() {
    let mut host = Mux::new(Role::Host);
    let long = host.request(vec![0; MAX_MESSAGE]).unwrap();
    assert_eq!(kinds(&mut host, 3).len(), 3);
    let small = host.request(b"{}".to_vec()).unwrap();
    assert!(kinds(&mut host, 2).contains(&(Kind::Request as u8, small)));
    assert_eq!(kinds(&mut host, 2), [(Kind::Request as u8, long); 2]);
}

#[test]
fn test_schedule_two_long_streams_take_turns() {
    let mut pair = Pair::new();
    let (a, b) = (pair.opened(), pair.opened());
    for id in [a, b] {
        assert_eq!(pair.host.send(id, STDIN, &vec![1; WINDOW]), Ok(WINDOW));
    }
    let order: Vec<u32> = kinds(&mut pair.host, 6).into_iter().map(|(_, id)| id).collect();
    assert_eq!(order, [a, b, a, b, a, b]);
}

#[test]
fn test_schedule_long_messages_never_exceed_what_the_peer_assembles() {
    let mut pair = Pair::new();
    for _ in 0..5 {
        pair.host.request(vec![0; MAX_MESSAGE]).unwrap();
    }
    let (mut host_in, mut guest_in, mut most) = (Vec::new(), Vec::new(), 0);
    while pair.step(&mut host_in, &mut guest_in) {
        most = most.max(pair.guest.assembling);
    }
    assert_eq!(guest_in.len(), 5);
    assert!(most <= MAX_ASSEMBLING && most > MAX_MESSAGE, "{most}");
}

#[test]
fn test_stream_without_reader_holds_one_window_and_goes_on_with_one() {
    let mut pair = Pair::new();
    let id = pair.opened();
    assert_eq!(pair.guest.send(id, STDOUT, &vec![1; 2 * WINDOW]), Ok(WINDOW));
    assert_eq!(pair.guest.room(id, STDOUT), 0);
    let (host_in, _) = pair.settle();
    let came: usize = host_in.iter().map(|i| if let Incoming::Data { bytes, .. } = i { bytes.len() } else { 0 }).sum();
    assert_eq!(came, WINDOW);
    assert_eq!(pair.guest.send(id, STDOUT, b"x"), Ok(0));
    pair.host.consumed(id, STDOUT, WINDOW);
    assert_eq!(pair.settle().1, [Incoming::Credit { id, channel: STDOUT }]);
    assert_eq!(pair.guest.room(id, STDOUT), WINDOW);
}

#[test]
fn test_stream_a_full_channel_does_not_stop_another_one_nor_the_response() {
    let mut pair = Pair::new();
    let id = pair.opened();
    pair.guest.send(id, STDOUT, &vec![1; WINDOW]).unwrap();
    pair.settle();
    pair.guest.send(id, STDERR, b"why").unwrap();
    pair.guest.finish(id, STDERR).unwrap();
    pair.guest.respond(id, b"done".to_vec()).unwrap();
    assert_eq!(
        pair.settle().0,
        [
            Incoming::Data { id, channel: STDERR, bytes: b"why".to_vec(), last: true },
            Incoming::Response { id, body: b"done".to_vec() }
        ]
    );
}

#[test]
fn test_stream_end_without_bytes_arrives() {
    let mut pair = Pair::new();
    let id = pair.opened();
    pair.host.finish(id, STDIN).unwrap();
    assert_eq!(pair.settle().1, [Incoming::Data { id, channel: STDIN, bytes: vec![], last: true }]);
    assert_eq!(pair.host.send(id, STDIN, b"more"), Err(Refused::Gone));
}

#[test]
fn test_control_and_started_arrive_in_their_places() {
    let mut pair = Pair::new();
    let id = pair.host.request(vec![0; 2 * MAX_PAYLOAD]).unwrap();
    pair.host.control(id, b"signal".to_vec()).unwrap();
    let (_, guest_in) = pair.settle();
    assert_eq!(guest_in[1], Incoming::Control { id, body: b"signal".to_vec() });
    pair.guest.send(id, STDOUT, b"out").unwrap();
    pair.guest.started(id, b"pid".to_vec()).unwrap();
    assert_eq!(pair.guest.started(id, b"pid".to_vec()), Err(Refused::Full));
    assert_eq!(pair.settle().0[0], Incoming::Started { id, body: b"pid".to_vec() });
}

#[test]
fn test_cancel_before_the_first_frame_sends_nothing() {
    let mut host = Mux::new(Role::Host);
    let id = host.request(b"{}".to_vec()).unwrap();
    assert_eq!((host.is_sent(id), host.cancel(id)), (Some(false), Ok(Cancelled::NeverSent)));
    assert!(kinds(&mut host, 9).is_empty() && host.is_empty());
    assert_eq!(host.cancel(id), Err(Refused::Gone));
}

#[test]
fn test_cancel_in_the_middle_undoes_the_request_and_lets_held_ones_begin() {
    let mut pair = Pair::new();
    let ids: Vec<u32> = (0..3).map(|_| pair.host.request(vec![0; MAX_MESSAGE]).unwrap()).collect();
    let (mut host_in, mut guest_in) = (Vec::new(), Vec::new());
    (0..10).for_each(|_| assert!(pair.step(&mut host_in, &mut guest_in)));
    assert!(ids[..2].iter().all(|id| pair.host.cancel(*id) == Ok(Cancelled::NeverSent)));
    let (_, guest_in) = pair.settle();
    assert_eq!(guest_in, [Incoming::Request { id: ids[2], body: vec![0; MAX_MESSAGE] }]);
    assert_eq!((pair.guest.len(), pair.guest.assembling), (1, 0));
}

#[test]
fn test_cancel_after_the_request_drops_data_and_still_brings_the_response() {
    let mut pair = Pair::new();
    let id = pair.opened();
    pair.guest.send(id, STDOUT, b"on its way").unwrap();
    pair.guest.send(id, STDERR, b"queued").unwrap();
    let mut late = Vec::new();
    assert!(pair.guest.next_frame(&mut late));
    assert_eq!((pair.host.is_sent(id), pair.host.cancel(id)), (Some(true), Ok(Cancelled::Sent)));
    assert_eq!(pair.host.receive(&late), Ok(None));
    assert_eq!(pair.settle().1, [Incoming::Cancel { id }]);
    assert_eq!(pair.guest.send(id, STDOUT, b"x"), Err(Refused::Gone));
    assert_eq!(pair.host.len(), 1);
    pair.guest.respond(id, vec![5; MAX_MESSAGE]).unwrap();
    assert_eq!(pair.settle().0, [Incoming::Response { id, body: vec![] }]);
    assert!(pair.host.is_empty() && pair.host.assembling == 0);
}

#[test]
fn test_late_frames_to_the_guest_are_dropped() {
    let mut pair = Pair::new();
    let id = pair.opened();
    pair.guest.respond(id, b"{}".to_vec()).unwrap();
    pair.host.send(id, STDIN, b"late").unwrap();
    pair.host.control(id, b"late".to_vec()).unwrap();
    let (host_in, guest_in) = pair.settle();
    assert_eq!((host_in.len(), guest_in.len()), (1, 0));
}

#[test]
fn test_ping_is_answered_once_and_not_repeated_before() {
    let mut pair = Pair::new();
    assert!(pair.host.ping(7) && !pair.host.ping(8));
    assert_eq!(pair.settle().0, [Incoming::Pong]);
    assert!(pair.host.ping(9));
}

#[test]
fn test_calls_are_capped_on_both_sides() {
    let mut host = Mux::new(Role::Host);
    let mut guest = Mux::new(Role::Guest);
    for id in 1..=MAX_CALLS as u32 {
        host.request(vec![]).unwrap();
        guest.receive(&frame(Kind::Request, true, id, b"{}")).unwrap();
    }
    assert_eq!(host.request(vec![]), Err(Refused::TooManyCalls));
    let one_more = guest.receive(&frame(Kind::Request, true, 9999, b"{}"));
    assert_eq!(one_more, Err(ProtocolError::TooManyCalls { limit: MAX_CALLS }));
}

#[test]
fn test_ids_come_round_past_those_still_open() {
    let mut host = Mux::new(Role::Host);
    assert_eq!(host.request(vec![]), Ok(1));
    host.newest = u32::MAX;
    assert_eq!(host.request(vec![]), Ok(2));
}

/// A host with call 1 open (its request is out) and call 2 still asking.
fn host_of_two() -> Mux {
    let mut host = Mux::new(Role::Host);
    host.request(b"{}".to_vec()).unwrap();
    assert_eq!(kinds(&mut host, 9).len(), 1);
    host.request(b"{}".to_vec()).unwrap();
    host
}

#[test]
fn test_host_rules_broken_end_the_connection_with_a_typed_error() {
    let data = |bytes: &[u8]| [&[STDOUT][..], bytes].concat();
    let credit = |bytes: u32| [&[STDIN][..], &bytes.to_be_bytes()].concat();
    let window = data(&vec![0; MAX_DATA]);
    let rows: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("the host's own kinds", vec![frame(Kind::Request, true, 1, b"{}")]),
        ("a cancel", vec![frame(Kind::Cancel, false, 1, b"")]),
        ("a ping", vec![frame(Kind::Ping, false, 1, b"")]),
        ("a pong nobody asked for", vec![frame(Kind::Pong, false, 1, b"")]),
        ("an event with an id", vec![frame(Kind::Event, false, 1, b"{}")]),
        ("a response to nothing", vec![frame(Kind::Response, true, 3, b"{}")]),
        ("a response to what was not asked yet", vec![frame(Kind::Response, true, 2, b"{}")]),
        ("two responses", vec![frame(Kind::Response, true, 1, b"{}"), frame(Kind::Response, true, 1, b"{}")]),
        ("empty pieces of a response", vec![frame(Kind::Response, false, 1, b"")]),
        ("data of nothing", vec![frame(Kind::Data, false, 3, &data(b"x"))]),
        ("data without channel", vec![frame(Kind::Data, false, 1, b"")]),
        ("data of a channel that is not", vec![frame(Kind::Data, false, 1, &[9, 1])]),
        ("empty data", vec![frame(Kind::Data, false, 1, &data(b""))]),
        ("data after its end", vec![frame(Kind::Data, true, 1, &data(b"")), frame(Kind::Data, false, 1, &data(b"x"))]),
        ("data beyond the window", vec![frame(Kind::Data, false, 1, &window); WINDOW / MAX_DATA + 1]),
        ("credit beyond the window", vec![frame(Kind::Credit, false, 1, &credit(1))]),
        ("credit of any size", vec![frame(Kind::Credit, false, 1, &credit(u32::MAX))]),
        ("credit cut short", vec![frame(Kind::Credit, false, 1, &[0, 1])]),
        ("credit of a channel that is not", vec![frame(Kind::Credit, false, 1, &[9, 0, 0, 0, 0])]),
        ("two starts", vec![frame(Kind::Started, false, 1, b"{}"), frame(Kind::Started, false, 1, b"{}")]),
        ("a control", vec![frame(Kind::Control, false, 1, b"{}")]),
        ("a frame cut short", vec![vec![2, 0, 0]]),
        ("an unknown kind", vec![vec![99, 0, 0, 0, 0, 0]]),
        ("an unknown flag", vec![vec![2, 2, 0, 0, 0, 1]]),
        (
            "a message without end",
            vec![frame(Kind::Response, false, 1, &vec![0; MAX_PAYLOAD]); 1 + MAX_MESSAGE / MAX_PAYLOAD],
        ),
    ];
    for (title, frames) in rows {
        let mut host = host_of_two();
        let (last, before) = frames.split_last().unwrap();
        assert!(before.iter().all(|frame| host.receive(frame).is_ok()), "{title}");
        assert!(host.receive(last).is_err(), "{title}");
    }
}

#[test]
fn test_guest_rules_broken_end_the_connection() {
    let rows = [
        ("a response", frame(Kind::Response, true, 1, b"{}")),
        ("a request of id 0", frame(Kind::Request, true, 0, b"{}")),
        ("a request again", frame(Kind::Request, true, 1, b"{}")),
        ("data before the request is whole", frame(Kind::Data, false, 2, &[0, 1])),
    ];
    for (title, bytes) in rows {
        let mut guest = Mux::new(Role::Guest);
        guest.receive(&frame(Kind::Request, true, 1, b"{}")).unwrap();
        guest.receive(&frame(Kind::Request, false, 2, b"{")).unwrap();
        assert!(guest.receive(&bytes).is_err(), "{title}");
    }
}

/// What a test does next, to the call that `which` points at among those open.
#[derive(Debug, Clone)]
enum Step {
    Ask(usize),
    Respond { which: usize, size: usize },
    Cancel { which: usize },
    Talk { which: usize, channel: u8, size: usize },
    Take { which: usize, channel: u8, size: usize },
    Finish { which: usize, channel: u8 },
    Control { which: usize },
    Ping,
    Move(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (which, channel, size) = (0usize..200, 0u8..3, prop_oneof![0usize..100, 0usize..200_000]);
    prop_oneof![
        2 => size.clone().prop_map(Step::Ask),
        2 => (which.clone(), size.clone()).prop_map(|(which, size)| Step::Respond { which, size }),
        1 => which.clone().prop_map(|which| Step::Cancel { which }),
        4 => (which.clone(), channel.clone(), size.clone()).prop_map(|(which, channel, size)| Step::Talk { which, channel, size }),
        4 => (which.clone(), channel.clone(), size).prop_map(|(which, channel, size)| Step::Take { which, channel, size }),
        1 => (which.clone(), channel).prop_map(|(which, channel)| Step::Finish { which, channel }),
        1 => which.prop_map(|which| Step::Control { which }),
        1 => Just(Step::Ping),
        6 => (1usize..12).prop_map(Step::Move),
    ]
}

/// Which side speaks on a channel.
fn speaker(pair: &mut Pair, channel: u8) -> (&mut Mux, &mut Mux) {
    match channel {
        STDIN => (&mut pair.host, &mut pair.guest),
        _ => (&mut pair.guest, &mut pair.host),
    }
}

/// Bytes that tell where in which stream they belong.
fn pattern(id: u32, channel: u8, from: usize, size: usize) -> Vec<u8> {
    (from..from + size).map(|at| (at * 31 + id as usize * 7 + usize::from(channel)) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever two honest sides do, and however their frames interleave, neither calls the other a liar; each response
    /// comes once, to its caller; each stream arrives in order, without a gap.
    #[test]
    fn test_honest_sides_always_agree(steps in prop::collection::vec(step(), 1..200)) {
        let mut pair = Pair::new();
        let (mut host_in, mut guest_in) = (Vec::new(), Vec::new());
        let mut ids: Vec<u32> = Vec::new();
        let mut said: HashMap<(u32, u8), usize> = HashMap::new();
        for step in steps {
            let pick = |which: usize| ids.get(which % ids.len().max(1)).copied().unwrap_or(77);
            match step {
                Step::Ask(size) => ids.extend(pair.host.request(pattern(0, 0, 0, size)).ok()),
                Step::Respond { which, size } => {
                    let id = pick(which);
                    let _gone = pair.guest.respond(id, pattern(id, 9, 0, size));
                }
                Step::Cancel { which } => {
                    let _gone = pair.host.cancel(pick(which));
                }
                Step::Talk { which, channel, size } => {
                    let id = pick(which);
                    let from = said.get(&(id, channel)).copied().unwrap_or(0);
                    if let Ok(taken) = speaker(&mut pair, channel).0.send(id, channel, &pattern(id, channel, from, size)) {
                        said.insert((id, channel), from + taken);
                    }
                }
                Step::Take { which, channel, size } => speaker(&mut pair, channel).1.consumed(pick(which), channel, size),
                Step::Finish { which, channel } => {
                    let _gone = speaker(&mut pair, channel).0.finish(pick(which), channel);
                }
                Step::Control { which } => {
                    let _gone = pair.host.control(pick(which), vec![1]);
                }
                Step::Ping => {
                    pair.host.ping(3);
                }
                Step::Move(count) => {
                    (0..count).for_each(|_| { pair.step(&mut host_in, &mut guest_in); });
                }
            }
        }
        let (more_host, more_guest) = pair.settle();
        host_in.extend(more_host);
        guest_in.extend(more_guest);
        let mut asked = std::collections::HashSet::new();
        let mut answered = std::collections::HashSet::new();
        let mut heard: HashMap<(u32, u8), usize> = HashMap::new();
        for incoming in guest_in.iter().chain(&host_in) {
            match incoming {
                Incoming::Request { id, .. } => prop_assert!(asked.insert(*id)),
                Incoming::Response { id, body } => {
                    prop_assert!(asked.contains(id) && answered.insert(*id));
                    prop_assert_eq!(body, &pattern(*id, 9, 0, body.len()));
                }
                Incoming::Data { id, channel, bytes, .. } => {
                    let at = heard.entry((*id, *channel)).or_default();
                    prop_assert_eq!(bytes, &pattern(*id, *channel, *at, bytes.len()));
                    *at += bytes.len();
                }
                _ => {}
            }
        }
        prop_assert!(!pair.host.has_outgoing() && !pair.guest.has_outgoing());
        prop_assert_eq!((pair.host.assembling, pair.guest.assembling), (0, 0));
    }

    #[test]
    fn test_any_frames_are_taken_or_refused_and_hold_little(frames in prop::collection::vec(
        (1u8..11, any::<bool>(), 0u32..4, prop::collection::vec(0u8..6, 0..40)), 0..100)
    ) {
        for mut mux in [host_of_two(), Mux::new(Role::Guest)] {
            for (kind, last, id, payload) in &frames {
                let mut bytes = vec![*kind, u8::from(*last)];
                bytes.extend_from_slice(&id.to_be_bytes());
                bytes.extend_from_slice(payload);
                if mux.receive(&bytes).is_err() {
                    break;
                }
            }
            prop_assert!(mux.assembling <= 100 * 40);
            kinds(&mut mux, 1000);
        }
    }
}
