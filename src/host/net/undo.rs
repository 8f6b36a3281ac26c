//! What was done, kept as what undoes it.

use super::{apply_all, set_setting, Change, Part, Tool};

/// One way back.
#[derive(Debug)]
pub enum Step {
    /// Lines for a tool; those about something that is gone are passed over.
    Batch(Tool, String),
    /// Changes of links and addresses; those of something that is gone are passed over.
    Links(Vec<Change>),
    /// A setting's old value.
    Setting(String, String),
    /// A part of the rules; dropping it takes it out.
    Rules(Part),
}

/// Undoes when dropped, the last step first. A step is noted before what it undoes is done: half of that may be.
#[derive(Debug, Default)]
pub struct Undo(Vec<Step>);

impl Undo {
    pub fn push(&mut self, step: Step) {
        self.0.push(step);
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(step) = self.0.pop() {
            match step {
                Step::Batch(tool, batch) => tool.run_all(&batch),
                Step::Links(changes) => apply_all(&changes),
                Step::Setting(path, value) => {
                    if let Err(refusal) = set_setting(&path, &value) {
                        log::warn!("the network was not cleaned up: {}", refusal.cause);
                    }
                }
                Step::Rules(part) => drop(part),
            }
        }
    }
}
