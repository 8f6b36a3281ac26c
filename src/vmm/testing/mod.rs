//! What the backends' unit tests share: golden files, a VMM's API that fails on demand, and the VMMs' own OpenAPI documents.

pub mod fake;
pub mod golden;
pub mod spec;
