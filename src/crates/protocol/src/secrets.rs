//! The primitives of the handshake and the session, with keys that are wiped.
//!
//! snow's own wrappers leave the session's keys in freed memory; these do not. What remains for a moment, in the
//! handshake's state, is snow's copy of the pre-shared key and its chaining key.

use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError};

use curve25519_dalek::montgomery::MontgomeryPoint;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};

use crate::identity::{Credentials, Key};

/// The default primitives, wrapped, with a Diffie-Hellman that was carried out already.
pub struct Wiping(pub Given);

impl CryptoResolver for Wiping {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        DefaultResolver.resolve_rng()
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        let dh = X25519 { given: self.0.clone(), own: None };
        matches!(choice, DHChoice::Curve25519).then(|| Box::new(dh) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice).map(|cipher| Box::new(WipedCipher(cipher)) as Box<dyn Cipher>)
    }
}

/// One side's credentials for one handshake, which may begin before they are there. They are used once.
#[derive(Debug, Clone, Default)]
pub struct Given(Arc<Mutex<Option<Credentials>>>);

impl Given {
    pub fn new(credentials: Credentials) -> Self {
        Self(Arc::new(Mutex::new(Some(credentials))))
    }

    pub fn set(&self, credentials: Credentials) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(credentials);
    }

    fn take(&self) -> Result<Credentials, snow::Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(snow::Error::Rng)
    }
}

/// The public key that belongs to a secret (RFC 7748).
pub fn public(secret: &Key) -> [u8; 32] {
    MontgomeryPoint::mul_base_clamped(secret.0).to_bytes()
}

/// What the holder of a secret and the one of a public key agree on (RFC 7748).
pub fn shared(secret: &Key, public: [u8; 32]) -> Key {
    Key(MontgomeryPoint(public).mul_clamped(secret.0).to_bytes())
}

/// A cipher whose key is overwritten when it is dropped.
struct WipedCipher(Box<dyn Cipher>);

impl Drop for WipedCipher {
    fn drop(&mut self) {
        self.0.set(black_box(&[0; 32]));
        black_box(&self.0);
    }
}

impl Cipher for WipedCipher {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn set(&mut self, key: &[u8; 32]) {
        self.0.set(key);
    }

    fn encrypt(&self, nonce: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        self.0.encrypt(nonce, authtext, plaintext, out)
    }

    fn decrypt(&self, nonce: u64, authtext: &[u8], ciphertext: &[u8], out: &mut [u8]) -> Result<usize, snow::Error> {
        self.0.decrypt(nonce, authtext, ciphertext, out)
    }

    fn rekey(&mut self) {
        self.0.rekey();
    }
}

/// X25519, carried out ahead of the handshake by the one who made both secrets.
struct X25519 {
    given: Given,
    own: Option<Credentials>,
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        32
    }

    fn priv_len(&self) -> usize {
        32
    }

    /// A static key, which the pattern does not have.
    fn set(&mut self, _privkey: &[u8]) {}

    fn generate(&mut self, _rng: &mut dyn Random) -> Result<(), snow::Error> {
        self.own = Some(self.given.take()?);
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        self.own.as_ref().map_or(&[0; 32], |own| &own.public)
    }

    /// The secret is not here.
    fn privkey(&self) -> &[u8] {
        &[0; 32]
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        let own = self.own.as_ref().filter(|own| pubkey.starts_with(&own.peer)).ok_or(snow::Error::Dh)?;
        out[..32].copy_from_slice(&own.shared.0);
        Ok(())
    }
}
