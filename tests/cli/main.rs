//! What the two programs say and how they exit, on good days and bad ones.

#[allow(dead_code)]
#[path = "../leaks/lab.rs"]
mod lab;
#[path = "../netns/mod.rs"]
mod netns;
#[allow(dead_code)]
#[path = "../leaks/table.rs"]
mod table;

mod config;
mod instances;
mod nft;
mod outputs;
mod status;
mod tools;
