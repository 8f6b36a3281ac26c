//! Why something failed, as a value: what a program may ask is asked of it, never of its text.

use std::error::Error;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::sync::Arc;

use nix::errno::Errno;

/// The error of the system, of a library or of another module, or a sentence where there is no such error.
///
/// It dereferences to what it holds and is no error itself, so that [`Error::source`] of what has it answers with that.
#[derive(Clone)]
pub struct Cause(Arc<dyn Error + Send + Sync>);

/// An error in the words of those who know what it is about.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct Explained {
    text: String,
    source: Cause,
}

impl<T: Into<Box<dyn Error + Send + Sync>>> From<T> for Cause {
    fn from(error: T) -> Self {
        Self(error.into().into())
    }
}

impl Deref for Cause {
    type Target = dyn Error + Send + Sync;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Cause {
    /// `error`, shown as `text`, which has what `error` says in it.
    pub fn explained(error: impl Into<Self>, text: impl Into<String>) -> Self {
        Explained { text: text.into(), source: error.into() }.into()
    }

    /// The system's error number, wherever in the chain it is.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        errno(&**self)
    }
}

/// The number that a system call failed with, of `error` or of what caused it.
pub fn errno(error: &(dyn Error + 'static)) -> Option<Errno> {
    if let Some(errno) = error.downcast_ref() {
        return Some(*errno);
    }
    let next = match error.downcast_ref::<io::Error>() {
        Some(error) => match (error.raw_os_error(), error.get_ref()) {
            (Some(number), _) => return Some(Errno::from_raw(number)),
            // Its `source` is that of the error within.
            (None, Some(within)) => Some(within as &(dyn Error + 'static)),
            (None, None) => None,
        },
        None => error.source(),
    };
    next.and_then(errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied() -> io::Error {
        io::Error::from_raw_os_error(libc::EACCES)
    }

    #[test]
    fn test_errno_is_found_wherever_it_is() {
        let wrapped = io::Error::other(crate::error::Error::host("open", "/x", denied()));
        let causes = [
            denied().into(),
            Errno::EACCES.into(),
            Cause::explained(denied(), "the key"),
            Cause::explained(Cause::explained(Errno::EACCES, "the key"), "the door"),
            wrapped.into(),
        ];
        for cause in causes {
            assert_eq!(cause.errno(), Some(Errno::EACCES), "{cause:?}");
        }
        for cause in [Cause::from("(os error 13)"), io::Error::other("EACCES").into(), fmt::Error.into()] {
            assert_eq!(cause.errno(), None, "{cause:?}");
        }
    }

    #[test]
    fn test_explained_shows_its_text_and_keeps_the_error() {
        let cause = Cause::explained(denied(), format!("/x: {}", denied()));
        assert_eq!(cause.to_string(), "/x: Permission denied (os error 13)");
        assert!(cause.source().unwrap().downcast_ref::<io::Error>().is_some());
    }
}
