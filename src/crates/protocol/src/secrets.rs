//! The primitives of the handshake and the session, with keys that are wiped.
//!
//! snow's own wrappers leave the session's keys and the ephemeral private key in freed memory; these do not. What remains
//! for a moment, in the handshake's state, is snow's copy of the pre-shared key and its chaining key.

use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError};

use curve25519_dalek::montgomery::MontgomeryPoint;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use zeroize::Zeroize;

use crate::identity::Key;

/// The default primitives, wrapped; with a [`Secret`], that is the only randomness there is.
pub struct Wiping(pub Option<Secret>);

impl CryptoResolver for Wiping {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        match &self.0 {
            Some(secret) => Some(Box::new(secret.clone())),
            None => DefaultResolver.resolve_rng(),
        }
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        matches!(choice, DHChoice::Curve25519).then(|| Box::<X25519>::default() as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice).map(|cipher| Box::new(WipedCipher(cipher)) as Box<dyn Cipher>)
    }
}

/// A guest's ephemeral secret, which comes with its identity: a guest has no entropy of its own that early, and its
/// host, which made the key, too, is no party to hide it from. It is used once.
#[derive(Debug, Clone, Default)]
pub struct Secret(Arc<Mutex<Option<Key>>>);

impl Secret {
    pub fn set(&self, key: Key) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(key);
    }
}

impl Random for Secret {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), snow::Error> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(key) if key.0.len() == dest.len() => {
                dest.copy_from_slice(&key.0);
                Ok(())
            }
            _ => Err(snow::Error::Rng),
        }
    }
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

/// X25519 (RFC 7748).
#[derive(Default)]
struct X25519 {
    private: [u8; 32],
    public: [u8; 32],
}

impl Drop for X25519 {
    fn drop(&mut self) {
        self.private.zeroize();
    }
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

    fn set(&mut self, privkey: &[u8]) {
        self.private.copy_from_slice(privkey);
        self.public = MontgomeryPoint::mul_base_clamped(self.private).to_bytes();
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        let mut private = [0; 32];
        rng.try_fill_bytes(&mut private)?;
        self.set(&private);
        private.zeroize();
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        &self.private
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        let point = pubkey.first_chunk::<32>().ok_or(snow::Error::Dh)?;
        let mut shared = MontgomeryPoint(*point).mul_clamped(self.private).to_bytes();
        out[..32].copy_from_slice(&shared);
        shared.zeroize();
        Ok(())
    }
}
