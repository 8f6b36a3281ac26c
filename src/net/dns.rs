//! What a relay makes of the DNS messages of a VM and of its servers (RFC 1035). Sans-IO.
//!
//! With an allow-list, only its names are asked for: a name that nobody may go to is of no use, but asking for it would
//! carry data out. What the answers hold for them is where the VM may go.

use std::net::Ipv4Addr;

use domain::base::iana::{Opcode, Rcode, Rtype};
use domain::base::{Message, MessageBuilder, Name, ToName};
use domain::rdata::{Cname, A};

use super::{Pinned, Segment};
use crate::model::EgressTarget;

/// An answer's addresses that are taken; the rest of a longer answer is not reached.
const MAX_ADDRESSES: usize = 64;
/// How many names may stand one for another.
const MAX_ALIASES: usize = 16;

/// A question of a VM that is to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    id: u16,
    name: Name<Vec<u8>>,
    kind: Rtype,
    message: Vec<u8>,
    /// The ports of the entries that its name fits.
    ports: Vec<Option<u16>>,
}

/// What becomes of a VM's message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
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
}

impl Verdict {
    /// Judges a message that the VM behind `segment` sent.
    #[must_use]
    pub fn on(message: &[u8], segment: &Segment) -> Self {
        let Ok(parsed) = Message::from_slice(message) else { return Verdict::Drop };
        if parsed.header().qr() {
            return Verdict::Drop;
        }
        if parsed.header().opcode() != Opcode::QUERY {
            return answer(parsed, Rcode::NOTIMP);
        }
        let Ok(question) = parsed.sole_question() else { return answer(parsed, Rcode::FORMERR) };
        let name: Name<Vec<u8>> = question.qname().to_name();
        let ports = match &segment.egress {
            None => Vec::new(),
            Some(_) => {
                let asked = name.to_string().to_ascii_lowercase();
                let fits = segment.named_rules().filter(|rule| match &rule.to {
                    EgressTarget::Name(pattern) => pattern.matches(&asked),
                    EgressTarget::Net(_) => false,
                });
                fits.map(|rule| rule.port).collect()
            }
        };
        if segment.egress.is_some() && ports.is_empty() {
            return answer(parsed, Rcode::REFUSED);
        }
        let kind = question.qtype();
        // The VM has no IPv6. What a service record says of addresses would not be let pass.
        let hints = [Rtype::HTTPS, Rtype::SVCB].contains(&kind) && segment.egress.is_some();
        if kind == Rtype::AAAA || hints {
            return answer(parsed, Rcode::NOERROR);
        }
        let id = parsed.header().id();
        Verdict::Ask(Box::new(Question { id, name, kind, message: message.to_vec(), ports }))
    }
}

/// An answer without records.
fn answer(question: &Message<[u8]>, rcode: Rcode) -> Verdict {
    match MessageBuilder::new_vec().start_answer(question, rcode) {
        Ok(mut builder) => {
            builder.header_mut().set_ra(true);
            Verdict::Answer(builder.finish())
        }
        Err(_) => Verdict::Drop,
    }
}

impl Question {
    /// The message for a server, which knows it by another number.
    #[must_use]
    pub fn asked_as(&self, id: u16) -> Vec<u8> {
        let mut message = self.message.clone();
        if let Some(place) = message.first_chunk_mut::<2>() {
            *place = id.to_be_bytes();
        }
        message
    }

    /// What the VM hears when no server answers.
    #[must_use]
    pub fn failed(&self) -> Option<Vec<u8>> {
        match answer(Message::from_slice(&self.message).ok()?, Rcode::SERVFAIL) {
            Verdict::Answer(message) => Some(message),
            Verdict::Ask(_) | Verdict::Drop => None,
        }
    }

    /// Reads a server's answer to what was asked as `id`; `None` when it is no answer to that.
    #[must_use]
    pub fn answered(&self, id: u16, message: &[u8]) -> Option<Relayed> {
        let parsed = Message::from_slice(message).ok()?;
        let header = parsed.header();
        let question = parsed.sole_question().ok()?;
        let same = header.qr() && header.id() == id && question.qtype() == self.kind;
        if !same || !question.qname().name_eq(&self.name) {
            return None;
        }
        let mut relayed = Relayed { message: message.to_vec(), pinned: Vec::new(), ttl_s: 0 };
        if let Some(place) = relayed.message.first_chunk_mut::<2>() {
            *place = self.id.to_be_bytes();
        }
        if !self.ports.is_empty() {
            let (addresses, ttl_s) = self.addresses(parsed)?;
            relayed.ttl_s = ttl_s;
            relayed.pinned = addresses
                .iter()
                .flat_map(|address| self.ports.iter().map(|port| Pinned { address: *address, port: *port }))
                .collect();
        }
        Some(relayed)
    }

    /// What the name asked for, or the names that stand for it, are said to be, and for how many seconds.
    fn addresses(&self, message: &Message<[u8]>) -> Option<(Vec<Ipv4Addr>, u32)> {
        let answers = message.answer().ok()?;
        let mut name = self.name.clone();
        for _ in 0..MAX_ALIASES {
            let mut found: Vec<(Ipv4Addr, u32)> = Vec::new();
            for record in answers.limit_to_in::<A>() {
                let record = record.ok()?;
                if record.owner().name_eq(&name) && found.len() < MAX_ADDRESSES {
                    found.push((record.data().addr(), record.ttl().as_secs()));
                }
            }
            if !found.is_empty() {
                let ttl_s = found.iter().map(|(_, ttl)| *ttl).min().unwrap_or(0);
                return Some((found.into_iter().map(|(address, _)| address).collect(), ttl_s));
            }
            let mut aliases = answers.limit_to_in::<Cname<_>>().flatten();
            let Some(alias) = aliases.find(|alias| alias.owner().name_eq(&name)) else { break };
            name = alias.data().cname().to_name();
        }
        Some((Vec::new(), 0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::segment::tests::example;
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

    fn judged(text: &str, kind: Rtype, egress: Option<&[&str]>) -> Verdict {
        Verdict::on(&query(text, kind), &example(egress))
    }

    fn asked(text: &str, egress: Option<&[&str]>) -> Question {
        match judged(text, Rtype::A, egress) {
            Verdict::Ask(question) => *question,
            other => panic!("{other:?}"),
        }
    }

    fn rcode(verdict: &Verdict) -> Rcode {
        let Verdict::Answer(message) = verdict else { panic!("{verdict:?}") };
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
        assert_eq!(rcode(&judged("secret.evil.test", Rtype::A, Some(list))), Rcode::REFUSED);
        assert_eq!(rcode(&judged("a.example.com", Rtype::TXT, Some(list))), Rcode::REFUSED);
        assert_eq!(asked("EXAMPLE.com", Some(list)).ports, [Some(443)]);
    }

    #[test]
    fn test_verdict_ipv6_and_hints_have_no_records() {
        assert_eq!(rcode(&judged("example.com", Rtype::AAAA, None)), Rcode::NOERROR);
        assert_eq!(rcode(&judged("example.com", Rtype::HTTPS, Some(&["example.com"]))), Rcode::NOERROR);
        assert!(matches!(judged("example.com", Rtype::HTTPS, None), Verdict::Ask(_)));
    }

    #[test]
    fn test_verdict_what_is_no_question_is_dropped_or_named() {
        let open = example(None);
        let mut reply = query("a.test", Rtype::A);
        reply[2] |= 0x80;
        let mut update = query("a.test", Rtype::A);
        update[2] |= 0x28;
        let cut = &query("a.test", Rtype::A)[..14];
        assert_eq!(Verdict::on(&reply, &open), Verdict::Drop);
        assert_eq!(Verdict::on(b"short", &open), Verdict::Drop);
        assert_eq!(rcode(&Verdict::on(&update, &open)), Rcode::NOTIMP);
        assert_eq!(rcode(&Verdict::on(cut, &open)), Rcode::FORMERR);
    }

    #[test]
    fn test_answered_pins_what_the_name_and_its_aliases_stand_for_and_nothing_else() {
        let question = asked("www.example.com", Some(&["*.example.com", "www.example.com:443"]));
        let sent = question.asked_as(99);
        let aliases = [("www.example.com", "edge.cdn.test"), ("edge.cdn.test", "n1.cdn.test")];
        let addresses = [("n1.cdn.test", [192, 0, 2, 1], 30), ("other.test", [192, 0, 2, 66], 5)];
        let relayed = question.answered(99, &reply(&sent, &aliases, &addresses)).unwrap();
        let address = Ipv4Addr::new(192, 0, 2, 1);
        assert_eq!(relayed.pinned, [Pinned { address, port: None }, Pinned { address, port: Some(443) }]);
        assert_eq!((relayed.ttl_s, relayed.message[..2].to_vec()), (30, vec![0, 7]));
    }

    #[test]
    fn test_answered_without_a_list_pins_nothing() {
        let question = asked("example.com", None);
        let message = reply(&question.asked_as(99), &[], &[("example.com", [192, 0, 2, 1], 30)]);
        assert!(question.answered(99, &message).unwrap().pinned.is_empty());
    }

    #[test]
    fn test_answered_another_question_or_number_is_no_answer() {
        let question = asked("example.com", Some(&["example.com"]));
        let addresses = [("example.com", [192, 0, 2, 1], 30)];
        assert_eq!(question.answered(98, &reply(&question.asked_as(99), &[], &addresses)), None);
        let other = asked("example.net", None).asked_as(99);
        assert_eq!(question.answered(99, &reply(&other, &[], &addresses)), None);
        assert_eq!(question.answered(99, &question.asked_as(99)), None);
    }

    #[test]
    fn test_answered_aliases_that_go_round_end() {
        let question = asked("example.com", Some(&["example.com"]));
        let aliases = [("example.com", "a.test"), ("a.test", "example.com")];
        let message = reply(&question.asked_as(99), &aliases, &[]);
        assert!(question.answered(99, &message).unwrap().pinned.is_empty());
    }

    proptest! {
        #[test]
        fn test_any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let listed = example(Some(&["example.com"]));
            prop_assert!(!matches!(Verdict::on(&bytes, &listed), Verdict::Ask(ref q) if q.ports.is_empty()));
            let question = asked("example.com", Some(&["example.com"]));
            let mut message = reply(&question.asked_as(99), &[], &[]);
            message.extend_from_slice(&bytes);
            message[7] = 3;
            if let Some(relayed) = question.answered(99, &message) {
                prop_assert!(relayed.pinned.len() <= MAX_ADDRESSES);
            }
        }
    }
}
