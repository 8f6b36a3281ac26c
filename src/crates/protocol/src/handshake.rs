//! The prelude: generations, then a Noise handshake by which both sides prove the VM's key.
//!
//! ```text
//! guest -> host   1 HELLO   magic "TWMV" | generation min u8 | max u8 | set-up failed u8
//! host  -> guest  2 OFFER   generation u8 | Noise message 1 (psk, e): the time, Unix ns u64 BE
//! guest -> host   3 ACCEPT  Noise message 2 (e, ee): JSON, whether the guest is what it should be
//! host  -> guest  4 AGAIN   (empty) instead of OFFER: say HELLO once more
//! host  -> guest  5 FREEZE  (empty) instead of OFFER: get ready to be frozen, then say HELLO once more
//! ```
//! HELLO is the readiness event: the guest is up and has no identity yet; that it reads, apart from this transport, when the
//! OFFER comes. A template is saved between the two, so all its clones have said the same HELLO. HELLO and the
//! generation chosen are the handshake's prologue, so whoever alters them breaks it. Both payloads are sealed; the first
//! one under the VM's key alone, without forward secrecy.

use snow::{Builder, HandshakeState};

use crate::identity::{Credentials, Key};
use crate::secrets::{Given, Wiping};
use crate::session::{Role, Session};
use crate::{record, ProtocolError, GENERATION_MAX, GENERATION_MIN};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const MAGIC: &[u8; 4] = b"TWMV";
const HELLO: u8 = 1;
const OFFER: u8 = 2;
const ACCEPT: u8 = 3;
const AGAIN: u8 = 4;
const FREEZE: u8 = 5;
/// No handshake message is longer: 32 bytes of key, 16 of tag, and what is said.
const MAX_HANDSHAKE: usize = 4096;
/// The longest payload of an ACCEPT; longer ones are for [`crate::session`].
pub const MAX_ACCEPT_PAYLOAD: usize = MAX_HANDSHAKE - 64;

fn noise(key: &Key, role: Role, prologue: &[u8], given: &Given) -> Result<HandshakeState, ProtocolError> {
    let cipher = |e: snow::Error| ProtocolError::Cipher { detail: e.to_string() };
    let params = PATTERN.parse().map_err(cipher)?;
    let builder = Builder::with_resolver(params, Box::new(Wiping(given.clone())))
        .psk(0, &key.0)
        .map_err(cipher)?
        .prologue(prologue)
        .map_err(cipher)?;
    match role {
        Role::Host => builder.build_initiator(),
        Role::Guest => builder.build_responder(),
    }
    .map_err(cipher)
}

fn prologue(hello: &[u8], generation: u8) -> Vec<u8> {
    let mut bytes = hello.to_vec();
    bytes.push(generation);
    bytes
}

fn refused(error: snow::Error) -> ProtocolError {
    ProtocolError::Authentication { detail: error.to_string() }
}

/// The host's side, from HELLO to a session.
#[derive(Debug)]
pub struct HostHandshake {
    key: Key,
    given: Given,
    noise: Option<HandshakeState>,
}

/// What a record led to.
#[derive(Debug)]
pub enum HostStep {
    /// Send these bytes and wait for the next record.
    Send(Vec<u8>),
    /// The session stands; the guest said this.
    Established(Box<Session>, Vec<u8>),
}

impl HostHandshake {
    #[must_use]
    pub fn new(credentials: Credentials) -> Self {
        Self { key: credentials.key.clone(), given: Given::new(credentials), noise: None }
    }

    /// Takes one record's body from the guest; `unix_time_ns` is now.
    ///
    /// # Errors
    /// Any [`ProtocolError`]; the connection cannot go on.
    pub fn receive(&mut self, body: &[u8], unix_time_ns: u64) -> Result<HostStep, ProtocolError> {
        match (self.noise.take(), body) {
            (None, [HELLO, rest @ ..]) => {
                let generation = choose_generation(rest)?;
                let mut noise = noise(&self.key, Role::Host, &prologue(rest, generation), &self.given)?;
                let mut offer = vec![OFFER, generation];
                let mut buffer = [0; MAX_HANDSHAKE];
                let length = noise.write_message(&unix_time_ns.to_be_bytes(), &mut buffer).map_err(refused)?;
                offer.extend_from_slice(&buffer[..length]);
                self.noise = Some(noise);
                let mut out = Vec::new();
                record::encode(&offer, &mut out)?;
                Ok(HostStep::Send(out))
            }
            (Some(mut noise), [ACCEPT, message @ ..]) => {
                let mut buffer = [0; MAX_HANDSHAKE];
                if message.len() > MAX_HANDSHAKE {
                    return Err(ProtocolError::Malformed { what: "ACCEPT" });
                }
                let length = noise.read_message(message, &mut buffer).map_err(refused)?;
                let session = Session::new(noise.into_transport_mode().map_err(refused)?, Role::Host);
                Ok(HostStep::Established(Box::new(session), buffer[..length].to_vec()))
            }
            (None, [kind, ..]) => Err(ProtocolError::UnexpectedPrelude { kind: *kind, expected: "HELLO" }),
            (Some(_), [kind, ..]) => Err(ProtocolError::UnexpectedPrelude { kind: *kind, expected: "ACCEPT" }),
            (_, []) => Err(ProtocolError::EmptyRecord),
        }
    }
}

/// What a host may ask of a guest that has no identity yet; the answer is a HELLO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Ask {
    Again = AGAIN,
    Freeze = FREEZE,
}

impl Ask {
    /// The record to send.
    ///
    /// # Errors
    /// None in practice: it always fits a record.
    pub fn encode(self) -> Result<Vec<u8>, ProtocolError> {
        let mut out = Vec::new();
        record::encode(&[self as u8], &mut out)?;
        Ok(out)
    }

    /// What a record's body asks; `None` for anything else.
    #[must_use]
    pub fn decode(body: &[u8]) -> Option<Self> {
        match body {
            [AGAIN] => Some(Self::Again),
            [FREEZE] => Some(Self::Freeze),
            _ => None,
        }
    }
}

/// Whether a HELLO's body says that the guest could not set itself up; why is in its ACCEPT.
#[must_use]
pub fn has_failed(hello: &[u8]) -> bool {
    hello.last() != Some(&0)
}

fn choose_generation(hello: &[u8]) -> Result<u8, ProtocolError> {
    let [m0, m1, m2, m3, min, max, _] = *hello else { return Err(ProtocolError::Malformed { what: "HELLO" }) };
    if [m0, m1, m2, m3] != *MAGIC || min > max {
        return Err(ProtocolError::Malformed { what: "HELLO" });
    }
    let newest = max.min(GENERATION_MAX);
    if newest < min.max(GENERATION_MIN) {
        return Err(ProtocolError::NoCommonGeneration { min, max });
    }
    Ok(newest)
}

/// The guest's side: say HELLO, take the OFFER, answer ACCEPT.
pub struct GuestHandshake {
    hello: Vec<u8>,
    given: Given,
    /// Made ahead of the OFFER, for the generation that it most likely names.
    noise: HandshakeState,
}

impl GuestHandshake {
    /// # Errors
    /// None in practice: the pattern is one that `snow` knows.
    pub fn new(set_up_failed: bool) -> Result<Self, ProtocolError> {
        let mut hello = MAGIC.to_vec();
        hello.extend_from_slice(&[GENERATION_MIN, GENERATION_MAX, u8::from(set_up_failed)]);
        let given = Given::default();
        let noise = noise(&Key([0; 32]), Role::Guest, &prologue(&hello, GENERATION_MAX), &given)?;
        Ok(Self { hello, given, noise })
    }

    /// The HELLO record, to be sent first.
    ///
    /// # Errors
    /// None in practice: HELLO always fits a record.
    pub fn hello(&self) -> Result<Vec<u8>, ProtocolError> {
        let mut body = vec![HELLO];
        body.extend_from_slice(&self.hello);
        let mut out = Vec::new();
        record::encode(&body, &mut out)?;
        Ok(out)
    }

    /// Takes the OFFER's body.
    ///
    /// # Errors
    /// [`ProtocolError::Authentication`] when the host does not hold the key.
    pub fn receive(mut self, body: &[u8], credentials: &Credentials) -> Result<Offered, ProtocolError> {
        let (generation, message) = match body {
            [OFFER, generation, message @ ..] if message.len() <= MAX_HANDSHAKE => (*generation, message),
            [OFFER, ..] => return Err(ProtocolError::Malformed { what: "OFFER" }),
            [kind, ..] => return Err(ProtocolError::UnexpectedPrelude { kind: *kind, expected: "OFFER" }),
            [] => return Err(ProtocolError::EmptyRecord),
        };
        if !(GENERATION_MIN..=GENERATION_MAX).contains(&generation) {
            return Err(ProtocolError::NoCommonGeneration { min: generation, max: generation });
        }
        if generation == GENERATION_MAX {
            self.noise.set_psk(0, &credentials.key.0).map_err(refused)?;
        } else {
            self.noise = noise(&credentials.key, Role::Guest, &prologue(&self.hello, generation), &self.given)?;
        }
        self.given.set(credentials.clone());
        let mut buffer = [0; MAX_HANDSHAKE];
        let length = self.noise.read_message(message, &mut buffer).map_err(refused)?;
        let time = buffer[..length].try_into().map_err(|_| ProtocolError::Malformed { what: "OFFER: its time" })?;
        Ok(Offered { unix_time_ns: u64::from_be_bytes(time), noise: self.noise })
    }
}

/// An OFFER of a host that holds the key.
#[derive(Debug)]
pub struct Offered {
    /// The host's wall clock when it made the offer.
    pub unix_time_ns: u64,
    noise: HandshakeState,
}

impl Offered {
    /// The ACCEPT record to send, and the session.
    ///
    /// # Errors
    /// [`ProtocolError::Malformed`] for a payload over [`MAX_ACCEPT_PAYLOAD`].
    pub fn accept(mut self, payload: &[u8]) -> Result<(Vec<u8>, Session), ProtocolError> {
        if payload.len() > MAX_ACCEPT_PAYLOAD {
            return Err(ProtocolError::Malformed { what: "ACCEPT: its payload is too long" });
        }
        let mut buffer = [0; MAX_HANDSHAKE];
        let length = self.noise.write_message(payload, &mut buffer).map_err(refused)?;
        let mut accept = vec![ACCEPT];
        accept.extend_from_slice(&buffer[..length]);
        let mut out = Vec::new();
        record::encode(&accept, &mut out)?;
        Ok((out, Session::new(self.noise.into_transport_mode().map_err(refused)?, Role::Guest)))
    }
}
