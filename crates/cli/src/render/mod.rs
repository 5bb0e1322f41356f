//! What people and scripts read. Everything that reaches standard output or standard error goes through here.

pub(crate) mod colour;
pub(crate) mod json;
pub(crate) mod lanes;
pub(crate) mod screen;
pub(crate) mod table;
pub(crate) mod transcript;
pub(crate) mod words;
