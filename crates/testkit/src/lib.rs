//! Fakes that are programs of their own, and what tests need around real programs.
//!
//! Nothing here is part of drover: only tests and tools depend on it. The fakes say that they are fakes wherever they
//! can be asked. Everything listens on loopback only.

pub mod cluster;
pub mod codex;
pub mod directive;
pub mod emulate;
pub mod fake_slurm;
pub mod fake_telegram;
pub mod lab;
pub mod mock_llm;
pub mod mock_responses;
pub mod netns;
mod skip;

pub use skip::{skip, this_test};
