//! CRC-32 as zlib has it, for an emulated CPU: there the SIMD form of the crates is slow, and so is each look into a table.
//!
//! Long inputs are folded without either. x^300 + x^155 + x^117 + x^89 + 1 is a multiple of the polynomial, so adding it,
//! shifted, to what is summed changes nothing of the sum: each word is cleared by adding its bits again 145, 183, 211 and
//! 300 bits further on. (Sam Russell, "Chorba: A novel CRC32 implementation", arXiv 2412.16398.)

/// What the folding leaves for the tables: the words that the last cleared one reaches.
const REACH: usize = 5 * 8;
/// Shorter inputs are not worth it.
const LONG: usize = 256;
const POLYNOMIAL: u32 = 0xedb8_8320;
/// `TABLES[k][b]` is the checksum of byte `b` with `k` zero bytes after it.
static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let (mut value, mut bit) = (byte as u32, 0);
        while bit < 8 {
            value = if value & 1 == 1 { POLYNOMIAL ^ (value >> 1) } else { value >> 1 };
            bit += 1;
        }
        tables[0][byte] = value;
        byte += 1;
    }
    let mut k = 1;
    while k < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[k - 1][byte];
            tables[k][byte] = tables[0][(before & 0xff) as usize] ^ (before >> 8);
            byte += 1;
        }
        k += 1;
    }
    tables
}

/// The checksum of the bytes so far.
#[derive(Debug, Default)]
pub struct Crc32(u32);

impl Crc32 {
    pub fn update(&mut self, bytes: &[u8]) {
        if bytes.len() < LONG {
            return self.look_up(bytes);
        }
        let (words, odd) = bytes.as_chunks::<8>();
        let (words, last) = words.split_at(words.len().saturating_sub(REACH / 8));
        // What later words, the next one first, will have added to them; the state so far is added to the first.
        let mut ahead = [u64::from(!self.0), 0, 0, 0, 0];
        for word in words {
            let [now, one, two, three, four] = ahead;
            let bits = now ^ u64::from_le_bytes(*word);
            ahead = [
                one,
                two ^ (bits << 17) ^ (bits << 55),
                three ^ (bits >> 47) ^ (bits >> 9) ^ (bits << 19),
                four ^ (bits >> 45) ^ (bits << 44),
                bits >> 20,
            ];
        }
        self.0 = !0;
        for (word, more) in last.iter().zip(ahead) {
            self.look_up(&(u64::from_le_bytes(*word) ^ more).to_le_bytes());
        }
        self.look_up(odd);
    }

    /// Eight bytes a step by tables.
    fn look_up(&mut self, bytes: &[u8]) {
        let mut state = !self.0;
        let (steps, rest) = bytes.as_chunks::<8>();
        for step in steps {
            let word = u64::from_le_bytes(*step) ^ u64::from(state);
            let [b0, b1, b2, b3, b4, b5, b6, b7] = word.to_le_bytes().map(usize::from);
            let [t0, t1, t2, t3, t4, t5, t6, t7] = &TABLES;
            state = t7[b0] ^ t6[b1] ^ t5[b2] ^ t4[b3] ^ t3[b4] ^ t2[b5] ^ t1[b6] ^ t0[b7];
        }
        for byte in rest {
            let [low, ..] = (state ^ u32::from(*byte)).to_le_bytes();
            state = TABLES[0][usize::from(low)] ^ (state >> 8);
        }
        self.0 = !state;
    }

    pub fn value(&self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_crc32_known_values_however_they_are_split() {
        // The check value of CRC-32/ISO-HDLC, and zlib.crc32(bytes(range(256)) * 5).
        let long: Vec<u8> = (0..=255).cycle().take(1280).collect();
        for (bytes, expected) in [(&b"123456789"[..], 0xcbf4_3926), (&b""[..], 0), (&long[..], 0x1e7a6d24)] {
            for cut in [0, bytes.len() / 3, bytes.len()] {
                let mut checksum = Crc32::default();
                checksum.update(&bytes[..cut]);
                checksum.update(&bytes[cut..]);
                assert_eq!(checksum.value(), expected);
            }
        }
    }

    #[test]
    fn test_crc32_folded_is_what_the_tables_say() {
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let bytes: Vec<u8> = (0..4096).map(|_| noise()).collect();
        for length in (0..=LONG + 64).chain([1000, 4095, 4096]) {
            for before in [0, 1, 300] {
                let (mut folded, mut looked_up) = (Crc32::default(), Crc32::default());
                folded.update(&bytes[..before]);
                looked_up.look_up(&bytes[..before]);
                folded.update(&bytes[..length]);
                looked_up.look_up(&bytes[..length]);
                assert_eq!(folded.value(), looked_up.value(), "{before} and {length} bytes");
            }
        }
    }
}
