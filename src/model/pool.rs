//! VMs that a manager keeps ready before anyone asks for them.

use std::path::PathBuf;

use super::ResourceLimits;

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

/// What VMs of one kind have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub limits: ResourceLimits,
    pub kernel_path: Option<PathBuf>,
    pub rootfs_path: Option<PathBuf>,
}

/// How many VMs of a shape stand by, and in which form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    pub shape: Shape,
    pub size: usize,
    pub form: Form,
}
