//! What a layer can be refused for.

use std::io;

/// Characters of a name in an error: a hostile one may have thousands.
const SHOWN: usize = 200;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{layer}: {entry:?} {problem}")]
    Entry { layer: String, entry: String, problem: String },
    #[error("{layer}: {problem}")]
    Layer { layer: String, problem: String },
    #[error("{layer} cannot be read: {source}")]
    Read { layer: String, source: io::Error },
    #[error("the image cannot be written: {0}")]
    Write(#[source] io::Error),
}

/// What is wrong in one layer, before that has a name.
#[derive(Debug)]
pub enum Problem {
    Entry { entry: Vec<u8>, problem: String },
    Layer(String),
    Read(io::Error),
}

impl Problem {
    pub fn entry(entry: &[u8], problem: impl Into<String>) -> Self {
        Self::Entry { entry: entry.to_vec(), problem: problem.into() }
    }

    pub(crate) fn of(self, layer: String) -> Error {
        match self {
            Self::Entry { entry, problem } => Error::Entry { layer, entry: shown(&entry), problem },
            Self::Layer(problem) => Error::Layer { layer, problem },
            Self::Read(source) => Error::Read { layer, source },
        }
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

/// The end of a long name says more than its beginning.
fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let length = text.chars().count();
    match length > SHOWN {
        true => format!("...{}", text.chars().skip(length - SHOWN).collect::<String>()),
        false => text.into_owned(),
    }
}
