//! What a relay makes of the DNS messages of a VM and of its servers (RFC 1035). Sans-IO.
//!
//! Nothing that a VM sends is passed on, and nothing that a server sends: a question is made anew of its name, in lower case,
//! and its type, an answer of its records. With an allow-list, only its names are asked for: a name that the VM may not go
//! to is of no use, but asking for it would carry data out. The public addresses that the answers hold for them are where
//! the VM may go; private ones are withheld unless the list itself names them as addresses: the owner of a name has no say
//! over the networks of this host.

use std::net::Ipv4Addr;

use domain::base::iana::{Class, Opcode, Rcode, Rtype};
use domain::base::message_builder::{AnswerBuilder, PushError, StaticCompressor};
use domain::base::name::ToLabelIter;
use domain::base::{Message, MessageBuilder, Name, ParsedRecord, ToName};
use domain::rdata::{AllRecordData, Cname, A};

use super::rules::is_never;
use super::Pinned;
use crate::model::{is_public, EgressRule, EgressTarget, Ipv4Net};

/// An answer's addresses that are taken; the rest of a longer answer is not reached.
const MAX_ADDRESSES: usize = 64;
/// The addresses of one answer, each with each port of the entries that its name fits.
const MAX_PINS: usize = 512;
/// How many names may stand one for another.
const MAX_ALIASES: usize = 16;
/// RFC 1035: what every resolver takes over UDP; RFC 9715: what needs no fragments anywhere.
const PLAIN_ROOM: u16 = 512;
const EDNS_ROOM: u16 = 1232;
/// An OPT record without options.
const OPT_LENGTH: usize = 11;
/// RFC 6895: from here up to 255 are types that no record has, but for requests (transfers, keys, "any").
const FIRST_META: u16 = 128;
const LAST_META: u16 = 255;

type Answer = AnswerBuilder<StaticCompressor<Vec<u8>>>;

/// How a message travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// A question of a VM that is to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    asked: Asked,
    /// In lower case.
    name: Name<Vec<u8>>,
    listed: Option<Listed>,
}

/// What the VM sent, as far as its answer needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    id: u16,
    recursion: bool,
    /// In the VM's spelling, by which it may know its answer.
    name: Name<Vec<u8>>,
    kind: Rtype,
    /// The size of its EDNS buffer; `None`: it sent no OPT record.
    edns: Option<u16>,
}

/// What an allow-list has to say about a name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    /// The ports of the entries that it fits.
    ports: Vec<Option<u16>>,
    /// The addresses that the list names by themselves.
    networks: Vec<Ipv4Net>,
}

/// What the relay does with a VM's message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Ask(Box<Question>),
    /// Send this back.
    Answer(Vec<u8>),
    /// Not a question at all.
    Drop,
}

/// An answer to pass on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relayed {
    pub message: Vec<u8>,
    /// Where the VM may go because of it, and for how long.
    pub pinned: Vec<Pinned>,
    pub ttl_s: u32,
    /// A private address that was left out.
    pub withheld: Option<Ipv4Addr>,
}

impl Decision {
    /// Decides on a message that a VM sent which has this allow-list, if any.
    #[must_use]
    pub fn on(message: &[u8], egress: Option<&[EgressRule]>) -> Self {
        let Ok(parsed) = Message::from_slice(message) else { return Decision::Drop };
        let header = parsed.header();
        if header.qr() {
            return Decision::Drop;
        }
        if header.opcode() != Opcode::QUERY {
            return Decision::Answer(bare(parsed, Rcode::NOTIMP));
        }
        let Ok(question) = parsed.sole_question() else { return Decision::Answer(bare(parsed, Rcode::FORMERR)) };
        let asked = Asked {
            id: header.id(),
            recursion: header.rd(),
            name: question.qname().to_name(),
            kind: question.qtype(),
            edns: parsed.opt().map(|opt| opt.udp_payload_size()),
        };
        let name: Name<Vec<u8>> = asked.name.to_canonical_name();
        let listed = egress.map(|rules| Listed::about(&name, rules));
        let meta = asked.kind == Rtype::OPT || (FIRST_META..=LAST_META).contains(&asked.kind.to_int());
        // The VM has no IPv6. What a service record says of addresses would not be let pass.
        let hints = [Rtype::HTTPS, Rtype::SVCB].contains(&asked.kind) && listed.is_some();
        let rcode = if listed.as_ref().is_some_and(|listed| listed.ports.is_empty()) {
            Rcode::REFUSED
        } else if meta || question.qclass() != Class::IN {
            Rcode::NOTIMP
        } else if asked.kind == Rtype::AAAA || hints {
            Rcode::NOERROR
        } else {
            return Decision::Ask(Box::new(Question { asked, name, listed }));
        };
        asked.answer(rcode, usize::from(PLAIN_ROOM), |_| Ok(())).map_or(Decision::Drop, Decision::Answer)
    }
}

impl Listed {
    fn about(name: &Name<Vec<u8>>, rules: &[EgressRule]) -> Self {
        let labels: Vec<&[u8]> =
            name.iter_labels().filter(|label| !label.is_root()).map(|label| label.as_slice()).collect();
        let (mut ports, mut networks) = (Vec::new(), Vec::new());
        for rule in rules {
            match &rule.to {
                EgressTarget::Name(pattern) if pattern.matches(&labels) => ports.push(rule.port),
                EgressTarget::Name(_) => {}
                EgressTarget::Net(net) => networks.push(*net),
            }
        }
        // An entry without a port says all that the others say.
        if ports.contains(&None) {
            ports = vec![None];
        }
        ports.sort_unstable();
        ports.dedup();
        Self { ports, networks }
    }

    fn names(&self, address: Ipv4Addr) -> bool {
        self.networks.iter().any(|net| net.contains(address))
    }
}

/// The head of an answer to what holds no question that could be repeated.
fn bare(message: &Message<[u8]>, rcode: Rcode) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    let header = builder.header_mut();
    header.set_id(message.header().id());
    header.set_qr(true);
    header.set_opcode(message.header().opcode());
    header.set_rcode(rcode);
    builder.finish()
}

impl Asked {
    /// A message for the VM with what `fill` writes; `None` when that does not fit `room`.
    fn answer(
        &self,
        rcode: Rcode,
        room: usize,
        fill: impl FnOnce(&mut Answer) -> Result<(), PushError>,
    ) -> Option<Vec<u8>> {
        let mut builder = MessageBuilder::from_target(StaticCompressor::new(Vec::new())).ok()?;
        builder.set_push_limit(room.saturating_sub(OPT_LENGTH));
        let header = builder.header_mut();
        header.set_id(self.id);
        header.set_qr(true);
        header.set_rd(self.recursion);
        header.set_ra(true);
        header.set_rcode(rcode);
        let mut builder = builder.question();
        builder.push((&self.name, self.kind)).ok()?;
        let mut builder = builder.answer();
        fill(&mut builder).ok()?;
        let mut builder = builder.additional();
        builder.clear_push_limit();
        if self.edns.is_some() {
            let own = |opt: &mut domain::base::message_builder::OptBuilder<'_, _>| {
                opt.set_udp_payload_size(EDNS_ROOM);
                Ok(())
            };
            builder.opt(own).ok()?;
        }
        Some(builder.finish().into_target())
    }

    /// What an answer to the VM may be long.
    fn room(&self, transport: Transport) -> usize {
        usize::from(match (transport, self.edns) {
            (Transport::Tcp, _) => u16::MAX,
            (Transport::Udp, None) => PLAIN_ROOM,
            (Transport::Udp, Some(size)) => size.clamp(PLAIN_ROOM, EDNS_ROOM),
        })
    }
}

impl Question {
    /// The message for a server, which knows it by a number of its own; `None` is for names that are too long.
    #[must_use]
    pub fn asked_as(&self, id: u16) -> Option<Vec<u8>> {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(id);
        builder.header_mut().set_rd(true);
        let mut builder = builder.question();
        builder.push((&self.name, self.asked.kind)).ok()?;
        let mut builder = builder.additional();
        if self.asked.edns.is_some() {
            let own = |opt: &mut domain::base::message_builder::OptBuilder<'_, _>| {
                opt.set_udp_payload_size(EDNS_ROOM);
                Ok(())
            };
            builder.opt(own).ok()?;
        }
        Some(builder.finish())
    }

    /// The name that is asked for, printable.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.to_string()
    }

    /// What the VM hears when no server answers.
    #[must_use]
    pub fn failed(&self) -> Option<Vec<u8>> {
        self.asked.answer(Rcode::SERVFAIL, usize::from(PLAIN_ROOM), |_| Ok(()))
    }

    /// Reads a server's answer to what was asked as `id`; `None` when it is no answer to that.
    #[must_use]
    pub fn answered(&self, id: u16, message: &[u8], transport: Transport) -> Option<Relayed> {
        let parsed = Message::from_slice(message).ok()?;
        let header = parsed.header();
        let question = parsed.sole_question().ok()?;
        let kind = self.asked.kind;
        let same = header.qr() && header.id() == id && question.qtype() == kind && question.qclass() == Class::IN;
        if !same || !question.qname().name_eq(&self.name) {
            return None;
        }
        let mut relayed = Relayed { message: Vec::new(), pinned: Vec::new(), ttl_s: 0, withheld: None };
        let found = match (&self.listed, kind) {
            _ if header.tc() => None,
            (Some(listed), Rtype::A) => Some(self.reached(parsed, listed, &mut relayed)?),
            _ => Some(records(parsed, |record| [kind, Rtype::CNAME, Rtype::DNAME].contains(&record.rtype()))),
        };
        let whole = found.and_then(|found| {
            let fill = |builder: &mut Answer| found.iter().try_for_each(|record| push(builder, record));
            self.asked.answer(header.rcode(), self.asked.room(transport), fill)
        });
        relayed.message = match whole {
            Some(whole) => whole,
            None => {
                (relayed.pinned, relayed.ttl_s) = (Vec::new(), 0);
                let cut = |builder: &mut Answer| {
                    builder.header_mut().set_tc(true);
                    Ok(())
                };
                self.asked.answer(header.rcode(), usize::from(PLAIN_ROOM), cut)?
            }
        };
        Some(relayed)
    }

    /// The records that lead to addresses where the VM may go; notes those in `relayed`.
    fn reached<'a>(
        &self,
        message: &'a Message<[u8]>,
        listed: &Listed,
        relayed: &mut Relayed,
    ) -> Option<Vec<ParsedRecord<'a, [u8]>>> {
        let most = (MAX_PINS / listed.ports.len().max(1)).clamp(1, MAX_ADDRESSES);
        let (mut name, mut passed) = (self.name.clone(), Vec::new());
        for _ in 0..MAX_ALIASES {
            let mut ttl_s: Option<u32> = None;
            let before = passed.len();
            for record in records(message, |record| record.rtype() == Rtype::A && record.owner().name_eq(&name)) {
                let address = record.to_record::<A>().ok()??.data().addr();
                let opens = is_public(address) && !is_never(address);
                if !opens && !listed.names(address) {
                    relayed.withheld = Some(address);
                } else if passed.len() - before < most {
                    // What the list names by its address is let pass by that entry, and no further.
                    let ports = listed.ports.iter().filter(|_| opens);
                    relayed.pinned.extend(ports.map(|port| Pinned { address, port: *port }));
                    ttl_s = Some(ttl_s.map_or(record.ttl().as_secs(), |ttl_s| ttl_s.min(record.ttl().as_secs())));
                    passed.push(record);
                }
            }
            if let Some(ttl_s) = ttl_s {
                relayed.ttl_s = ttl_s;
                return Some(passed);
            }
            let aliases = records(message, |record| record.rtype() == Rtype::CNAME && record.owner().name_eq(&name));
            let Some(alias) = aliases.into_iter().next().filter(|_| relayed.withheld.is_none()) else { break };
            name = alias.to_record::<Cname<_>>().ok()??.data().cname().to_name();
            passed.push(alias);
        }
        Some(if relayed.withheld.is_some() { Vec::new() } else { passed })
    }
}

/// The records of the answer that are wanted, up to the first that cannot be read.
fn records<'a>(
    message: &'a Message<[u8]>,
    is_wanted: impl Fn(&ParsedRecord<'a, [u8]>) -> bool,
) -> Vec<ParsedRecord<'a, [u8]>> {
    let Ok(answer) = message.answer() else { return Vec::new() };
    let readable = answer.map_while(Result::ok).filter(|record| record.class() == Class::IN);
    readable.filter(is_wanted).collect()
}

/// Writes a record anew; what cannot be understood is left out.
fn push(builder: &mut Answer, record: &ParsedRecord<'_, [u8]>) -> Result<(), PushError> {
    match record.to_any_record::<AllRecordData<_, _>>() {
        Ok(record) => builder.push(record),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::vm_network::tests::example;
    use super::*;
    use proptest::prelude::*;
    use std::str::FromStr;

    fn name(text: &str) -> Name<Vec<u8>> {
        Name::from_str(text).unwrap()
    }

    fn query(text: &str, kind: Rtype) -> Vec<u8> {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(7);
        builder.header_mut().set_rd(true);
        let mut builder = builder.question();
        builder.push((name(text), kind)).unwrap();
        builder.finish()
    }

    fn decided(text: &str, kind: Rtype, egress: Option<&[&str]>) -> Decision {
        Decision::on(&query(text, kind), example(egress).egress.as_deref())
    }

    fn asked(text: &str, egress: Option<&[&str]>) -> Question {
        match decided(text, Rtype::A, egress) {
            Decision::Ask(question) => *question,
            other => panic!("{other:?}"),
        }
    }

    fn sent(question: &Question, id: u16) -> Vec<u8> {
        question.asked_as(id).unwrap()
    }

    fn answered(question: &Question, message: &[u8]) -> Option<Relayed> {
        question.answered(99, message, Transport::Udp)
    }

    fn ports(question: &Question) -> Vec<Option<u16>> {
        question.listed.as_ref().unwrap().ports.clone()
    }

    /// The addresses that an answer holds.
    fn told(message: &[u8]) -> Vec<Ipv4Addr> {
        let message = Message::from_slice(message).unwrap();
        let addresses = message.answer().unwrap().limit_to_in::<A>();
        addresses.map(|record| record.unwrap().data().addr()).collect()
    }

    fn rcode(decision: &Decision) -> Rcode {
        let Decision::Answer(message) = decision else { panic!("{decision:?}") };
        let message = Message::from_slice(message).unwrap();
        assert!(message.header().qr() && message.header().id() == 7);
        message.header().rcode()
    }

    /// An answer by a server: aliases, then addresses.
    fn reply(to: &[u8], aliases: &[(&str, &str)], addresses: &[(&str, [u8; 4], u32)]) -> Vec<u8> {
        let question = Message::from_slice(to).unwrap();
        let mut builder = MessageBuilder::new_vec().start_answer(question, Rcode::NOERROR).unwrap();
        for (alias, target) in aliases {
            builder.push((name(alias), 60, Cname::new(name(target)))).unwrap();
        }
        for (owner, [a, b, c, d], ttl) in addresses {
            builder.push((name(owner), *ttl, A::from_octets(*a, *b, *c, *d))).unwrap();
        }
        builder.finish()
    }

    #[test]
    fn test_verdict_a_name_outside_of_the_list_is_refused() {
        let list: &[&str] = &["example.com:443", "10.0.0.0/8"];
        assert_eq!(rcode(&decided("secret.evil.test", Rtype::A, Some(list))), Rcode::REFUSED);
        assert_eq!(rcode(&decided("a.example.com", Rtype::TXT, Some(list))), Rcode::REFUSED);
        assert_eq!(ports(&asked("EXAMPLE.com", Some(list))), [Some(443)]);
        let many = ["example.com:443", "*.com", "example.com", "example.com:80", "example.com:80"];
        assert_eq!(ports(&asked("example.com", Some(&many))), [None]);
        assert_eq!(ports(&asked("example.com", Some(&many[3..]))), [Some(80)]);
    }

    #[test]
    fn test_verdict_a_label_that_holds_a_dot_is_not_on_the_list() {
        let list: &[&str] = &["*.wild.test"];
        assert_eq!(rcode(&decided(r"secret-data\.wild.test", Rtype::A, Some(list))), Rcode::REFUSED);
        assert_eq!(ports(&asked(r"secret\.data.wild.test", Some(list))), [None]);
    }

    #[test]
    fn test_verdict_transfers_keys_and_other_classes_are_not_implemented() {
        for kind in [Rtype::AXFR, Rtype::ANY, Rtype::TKEY, Rtype::OPT] {
            assert_eq!(rcode(&decided("example.com", kind, None)), Rcode::NOTIMP, "{kind}");
        }
        let mut chaos = query("version.bind", Rtype::TXT);
        let last = chaos.len() - 1;
        chaos[last] = 3;
        assert_eq!(rcode(&Decision::on(&chaos, None)), Rcode::NOTIMP);
    }

    #[test]
    fn test_question_is_made_anew() {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(7);
        builder.header_mut().set_ad(true);
        builder.header_mut().set_cd(true);
        builder.header_mut().set_z(true);
        let mut builder = builder.question();
        builder.push((name("eXaMpLe.CoM"), Rtype::A)).unwrap();
        let mut builder = builder.answer();
        builder.push((name("carried.out"), 7, A::from_octets(1, 2, 3, 4))).unwrap();
        let mut builder = builder.additional();
        let secret = domain::base::opt::UnknownOptData::new(65001.into(), vec![b'x'; 200]).unwrap();
        let fill = |opt: &mut domain::base::message_builder::OptBuilder<'_, _>| {
            opt.set_udp_payload_size(4096);
            opt.set_dnssec_ok(true);
            opt.push(&secret)
        };
        builder.opt(fill).unwrap();
        let message = [builder.finish(), b"and a trailer".to_vec()].concat();
        let Decision::Ask(question) = Decision::on(&message, example(Some(&["example.com"])).egress.as_deref()) else {
            panic!()
        };
        // RFC 1035 and 6891: the header, one question, one OPT record that says 1232 and nothing else.
        let mut expected = b"\0\x63\x01\0\0\x01\0\0\0\0\0\x01\x07example\x03com\0\0\x01\0\x01".to_vec();
        expected.extend_from_slice(b"\0\0\x29\x04\xd0\0\0\0\0\0\0");
        assert_eq!(sent(&question, 99), expected);
        let plain = query("EXAMPLE.com", Rtype::A);
        let Decision::Ask(question) = Decision::on(&plain, None) else { panic!() };
        assert_eq!(sent(&question, 99).len(), expected.len() - OPT_LENGTH);
    }

    #[test]
    fn test_answer_is_made_anew_for_the_vms_spelling() {
        let question = asked("eXample.com", None);
        let parsed = sent(&question, 99);
        let parsed = Message::from_slice(&parsed).unwrap();
        let mut builder = MessageBuilder::new_vec().start_answer(parsed, Rcode::NOERROR).unwrap();
        builder.header_mut().set_ad(true);
        builder.push((name("example.com"), 60, A::from_octets(10, 2, 3, 4))).unwrap();
        let mut builder = builder.additional();
        builder.push((name("more.example.com"), 60, A::from_octets(192, 0, 2, 9))).unwrap();
        let message = answered(&question, &builder.finish()).unwrap().message;
        let answer = Message::from_slice(&message).unwrap();
        assert!(!answer.header().ad() && answer.header().ra() && answer.header().rd());
        let counts = answer.header_counts();
        assert_eq!((counts.qdcount(), counts.ancount(), counts.nscount(), counts.arcount()), (1, 1, 0, 0));
        assert!(message.windows(7).any(|window| window == b"eXample"));
        assert_eq!(told(&message), [Ipv4Addr::new(10, 2, 3, 4)]);
    }

    #[test]
    fn test_answer_that_does_not_fit_is_cut_over_udp_and_whole_over_tcp() {
        let question = asked("example.com", Some(&["example.com"]));
        let addresses: Vec<_> = (0..60).map(|n| ("example.com", [192, 0, 2, n], 60)).collect();
        let message = reply(&sent(&question, 99), &[], &addresses);
        let cut = answered(&question, &message).unwrap();
        assert!(Message::from_slice(&cut.message).unwrap().header().tc() && cut.pinned.is_empty());
        let whole = question.answered(99, &message, Transport::Tcp).unwrap();
        assert_eq!((told(&whole.message).len(), whole.pinned.len()), (60, 60));
    }

    #[test]
    fn test_answered_private_addresses_are_withheld_unless_the_list_names_them() {
        let addresses =
            [("a.test", [10, 20, 0, 7], 30), ("a.test", [10, 99, 0, 1], 30), ("a.test", [192, 0, 2, 1], 50)];
        let (seen, public) = (Ipv4Addr::new(10, 20, 0, 7), Ipv4Addr::new(192, 0, 2, 1));
        let question = asked("a.test", Some(&["a.test:443", "10.20.0.0/16:80"]));
        let relayed = answered(&question, &reply(&sent(&question, 99), &[], &addresses)).unwrap();
        // The entry that names the private address says what may be reached there: the name opens nothing more of it.
        assert_eq!(relayed.pinned, [Pinned { address: public, port: Some(443) }]);
        assert_eq!(told(&relayed.message), [seen, public]);
        assert_eq!(relayed.withheld, Some(Ipv4Addr::new(10, 99, 0, 1)));
        let rebound = answered(&question, &reply(&sent(&question, 99), &[], &addresses[1..2])).unwrap();
        assert!(rebound.pinned.is_empty() && told(&rebound.message).is_empty());
        let aliased = [("a.test", "b.test")];
        let rebound = reply(&sent(&question, 99), &aliased, &[("b.test", [192, 168, 1, 1], 30)]);
        let rebound = answered(&question, &rebound).unwrap();
        assert!(rebound.pinned.is_empty() && told(&rebound.message).is_empty() && rebound.withheld.is_some());
    }

    #[test]
    fn test_answered_with_many_ports_pins_no_more_than_the_rules_take() {
        let entries: Vec<String> = (1..=200).map(|port| format!("a.test:{port}")).collect();
        let entries: Vec<&str> = entries.iter().map(String::as_str).collect();
        let question = asked("a.test", Some(&entries));
        let addresses: Vec<_> = (0..60).map(|n| ("a.test", [192, 0, 2, n], 60)).collect();
        let message = reply(&sent(&question, 99), &[], &addresses);
        let relayed = question.answered(99, &message, Transport::Tcp).unwrap();
        assert_eq!((relayed.pinned.len(), told(&relayed.message).len()), (400, 2));
    }

    #[test]
    fn test_verdict_ipv6_and_hints_have_no_records() {
        assert_eq!(rcode(&decided("example.com", Rtype::AAAA, None)), Rcode::NOERROR);
        assert_eq!(rcode(&decided("example.com", Rtype::HTTPS, Some(&["example.com"]))), Rcode::NOERROR);
        assert!(matches!(decided("example.com", Rtype::HTTPS, None), Decision::Ask(_)));
    }

    #[test]
    fn test_verdict_what_is_no_question_is_dropped_or_named() {
        let mut reply = query("a.test", Rtype::A);
        reply[2] |= 0x80;
        let mut update = query("a.test", Rtype::A);
        update[2] |= 0x28;
        let cut = &query("a.test", Rtype::A)[..14];
        assert_eq!(Decision::on(&reply, None), Decision::Drop);
        assert_eq!(Decision::on(b"short", None), Decision::Drop);
        assert_eq!(rcode(&Decision::on(&update, None)), Rcode::NOTIMP);
        assert_eq!(rcode(&Decision::on(cut, None)), Rcode::FORMERR);
    }

    #[test]
    fn test_answered_pins_what_the_name_and_its_aliases_stand_for_and_nothing_else() {
        let question = asked("www.example.com", Some(&["*.example.com:80", "www.example.com:443"]));
        let asked = sent(&question, 99);
        let aliases = [("www.example.com", "edge.cdn.test"), ("edge.cdn.test", "n1.cdn.test")];
        let addresses = [("n1.cdn.test", [192, 0, 2, 1], 30), ("other.test", [192, 0, 2, 66], 5)];
        let relayed = answered(&question, &reply(&asked, &aliases, &addresses)).unwrap();
        let address = Ipv4Addr::new(192, 0, 2, 1);
        assert_eq!(relayed.pinned, [Pinned { address, port: Some(80) }, Pinned { address, port: Some(443) }]);
        assert_eq!((relayed.ttl_s, relayed.message[..2].to_vec()), (30, vec![0, 7]));
    }

    #[test]
    fn test_answered_without_a_list_pins_nothing() {
        let question = asked("example.com", None);
        let message = reply(&sent(&question, 99), &[], &[("example.com", [192, 0, 2, 1], 30)]);
        assert!(answered(&question, &message).unwrap().pinned.is_empty());
    }

    #[test]
    fn test_answered_another_question_or_number_is_no_answer() {
        let question = asked("example.com", Some(&["example.com"]));
        let addresses = [("example.com", [192, 0, 2, 1], 30)];
        assert_eq!(question.answered(98, &reply(&sent(&question, 99), &[], &addresses), Transport::Udp), None);
        let other = sent(&asked("example.net", None), 99);
        assert_eq!(answered(&question, &reply(&other, &[], &addresses)), None);
        assert_eq!(answered(&question, &sent(&question, 99)), None);
    }

    #[test]
    fn test_answered_aliases_that_go_round_end() {
        let question = asked("example.com", Some(&["example.com"]));
        let aliases = [("example.com", "a.test"), ("a.test", "example.com")];
        let message = reply(&sent(&question, 99), &aliases, &[]);
        assert!(answered(&question, &message).unwrap().pinned.is_empty());
    }

    proptest! {
        #[test]
        fn test_any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let listed = example(Some(&["example.com"]));
            prop_assert!(!matches!(Decision::on(&bytes, listed.egress.as_deref()), Decision::Ask(ref q) if ports(q).is_empty()));
            let question = asked("example.com", Some(&["example.com"]));
            let mut message = reply(&sent(&question, 99), &[], &[]);
            message.extend_from_slice(&bytes);
            message[7] = 3;
            if let Some(relayed) = answered(&question, &message) {
                prop_assert!(relayed.pinned.len() <= MAX_ADDRESSES);
            }
        }
    }
}
