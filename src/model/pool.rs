//! VMs that a manager keeps ready before anyone asks for them.

use super::VmSpec;

/// How far the start of a VM that stands by has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The VMM runs: its own start-up is saved.
    Blank,
    /// The template is loaded, too.
    Restored,
    /// The guest has answered: only waking it is left.
    Ready,
}

impl Form {
    pub const ALL: [Form; 3] = [Form::Blank, Form::Restored, Form::Ready];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Form::Blank => "blank",
            Form::Restored => "restored",
            Form::Ready => "ready",
        }
    }
}

/// How many VMs like `vm` stand by, and in which form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    pub vm: VmSpec,
    pub size: usize,
    pub form: Form,
}
