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

use crate::identity::{Key, KeyPair};

/// The default primitives, wrapped; with [`Given`], the ephemeral keys are those.
pub struct Wiping(pub Option<Given>);

impl CryptoResolver for Wiping {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        DefaultResolver.resolve_rng()
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        let dh = X25519 { given: self.0.clone(), ..X25519::default() };
        matches!(choice, DHChoice::Curve25519).then(|| Box::new(dh) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice).map(|cipher| Box::new(WipedCipher(cipher)) as Box<dyn Cipher>)
    }
}

/// A guest's ephemeral keys, which come with its identity: a guest has no entropy of its own that early, an emulated one
/// would take milliseconds to make them, and its host, which made the VM's key, too, is no party to hide them from. They
/// are used once.
#[derive(Debug, Clone, Default)]
pub struct Given(Arc<Mutex<Option<KeyPair>>>);

impl Given {
    pub fn set(&self, keys: KeyPair) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(keys);
    }

    fn take(&self) -> Result<KeyPair, snow::Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(snow::Error::Rng)
    }
}

/// The public key that belongs to a secret.
pub fn public(secret: &Key) -> [u8; 32] {
    MontgomeryPoint::mul_base_clamped(secret.0).to_bytes()
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
    given: Option<Given>,
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
        if let Some(given) = &self.given {
            let keys = given.take()?;
            (self.private, self.public) = (keys.secret.0, keys.public);
            return Ok(());
        }
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
