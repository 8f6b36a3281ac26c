//! The prelude: generations, then a Noise handshake by which both sides prove the VM's key.
//!
//! ```text
//! guest -> host   1 HELLO   magic "TWMV" | generation min u8 | max u8
//! host  -> guest  2 OFFER   generation u8 | Noise message 1 (psk, e)
//! guest -> host   3 ACCEPT  Noise message 2 (e, ee)
//! ```
//! HELLO is the readiness event: the guest sends it as soon as it has opened its port. HELLO and the generation chosen
//! are the handshake's prologue, so whoever alters them breaks it.

use snow::{Builder, HandshakeState};

use crate::identity::Key;
use crate::secrets::Wiping;
use crate::session::{Role, Session};
use crate::{record, ProtocolError, GENERATION_MAX, GENERATION_MIN};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const MAGIC: &[u8; 4] = b"TWMV";
const HELLO: u8 = 1;
const OFFER: u8 = 2;
const ACCEPT: u8 = 3;
/// No handshake message is longer: 32 bytes of key, 16 of tag, and slack.
const MAX_HANDSHAKE: usize = 256;

/// The ephemeral private key: always fresh, but for the tests that freeze every byte.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ephemeral(#[cfg(test)] pub Option<[u8; 32]>);

fn noise(key: &Key, role: Role, prologue: &[u8], ephemeral: &Ephemeral) -> Result<HandshakeState, ProtocolError> {
    let cipher = |e: snow::Error| ProtocolError::Cipher { detail: e.to_string() };
    let params = PATTERN.parse().map_err(cipher)?;
    let builder = Builder::with_resolver(params, Box::new(Wiping))
        .psk(0, &key.0)
        .map_err(cipher)?
        .prologue(prologue)
        .map_err(cipher)?;
    #[cfg(test)]
    let builder = match &ephemeral.0 {
        Some(fixed) => builder.fixed_ephemeral_key_for_testing_only(fixed),
        None => builder,
    };
    #[cfg(not(test))]
    let Ephemeral() = ephemeral;
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
    noise: Option<HandshakeState>,
    pub(crate) ephemeral: Ephemeral,
}

/// What a record led to.
#[derive(Debug)]
pub enum HostStep {
    /// Send these bytes and wait for the next record.
    Send(Vec<u8>),
    Established(Box<Session>),
}

impl HostHandshake {
    #[must_use]
    pub fn new(key: Key) -> Self {
        Self { key, noise: None, ephemeral: Ephemeral::default() }
    }

    /// Takes one record's body from the guest.
    ///
    /// # Errors
    /// Any [`ProtocolError`]; the connection cannot go on.
    pub fn receive(&mut self, body: &[u8]) -> Result<HostStep, ProtocolError> {
        match (self.noise.take(), body) {
            (None, [HELLO, rest @ ..]) => {
                let generation = choose_generation(rest)?;
                let mut noise = noise(&self.key, Role::Host, &prologue(rest, generation), &self.ephemeral)?;
                let mut offer = vec![OFFER, generation];
                let mut buffer = [0; MAX_HANDSHAKE];
                let length = noise.write_message(&[], &mut buffer).map_err(refused)?;
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
                noise.read_message(message, &mut buffer).map_err(refused)?;
                let noise = noise.into_transport_mode().map_err(refused)?;
                Ok(HostStep::Established(Box::new(Session::new(noise, Role::Host))))
            }
            (None, [kind, ..]) => Err(ProtocolError::UnexpectedPrelude { kind: *kind, expected: "HELLO" }),
            (Some(_), [kind, ..]) => Err(ProtocolError::UnexpectedPrelude { kind: *kind, expected: "ACCEPT" }),
            (_, []) => Err(ProtocolError::EmptyRecord),
        }
    }
}

fn choose_generation(hello: &[u8]) -> Result<u8, ProtocolError> {
    let [m0, m1, m2, m3, min, max] = *hello else { return Err(ProtocolError::Malformed { what: "HELLO" }) };
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
#[derive(Debug)]
pub struct GuestHandshake {
    hello: Vec<u8>,
    pub(crate) ephemeral: Ephemeral,
}

impl Default for GuestHandshake {
    fn default() -> Self {
        let mut hello = MAGIC.to_vec();
        hello.extend_from_slice(&[GENERATION_MIN, GENERATION_MAX]);
        Self { hello, ephemeral: Ephemeral::default() }
    }
}

impl GuestHandshake {
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

    /// Takes the OFFER's body; returns the ACCEPT record to send, and the session.
    ///
    /// # Errors
    /// [`ProtocolError::Authentication`] when the host does not hold the key; say HELLO again on a fresh connection.
    pub fn receive(&self, body: &[u8], key: &Key) -> Result<(Vec<u8>, Session), ProtocolError> {
        let (generation, message) = match body {
            [OFFER, generation, message @ ..] if message.len() <= MAX_HANDSHAKE => (*generation, message),
            [OFFER, ..] => return Err(ProtocolError::Malformed { what: "OFFER" }),
            [kind, ..] => return Err(ProtocolError::UnexpectedPrelude { kind: *kind, expected: "OFFER" }),
            [] => return Err(ProtocolError::EmptyRecord),
        };
        if !(GENERATION_MIN..=GENERATION_MAX).contains(&generation) {
            return Err(ProtocolError::NoCommonGeneration { min: generation, max: generation });
        }
        let mut noise = noise(key, Role::Guest, &prologue(&self.hello, generation), &self.ephemeral)?;
        let mut buffer = [0; MAX_HANDSHAKE];
        noise.read_message(message, &mut buffer).map_err(refused)?;
        let length = noise.write_message(&[], &mut buffer).map_err(refused)?;
        let mut accept = vec![ACCEPT];
        accept.extend_from_slice(&buffer[..length]);
        let mut out = Vec::new();
        record::encode(&accept, &mut out)?;
        Ok((out, Session::new(noise.into_transport_mode().map_err(refused)?, Role::Guest)))
    }
}
