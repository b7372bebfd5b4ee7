//! The main job with real programs: nginx and curl, redis, python, two hosts and the tunnel between them.
//!
//! Every test has a world of its own, and shows the refused case beside the accepted one.

#[path = "../netns/mod.rs"]
mod netns;

mod addresses;
mod answers;
mod attestation;
mod bad_input;
mod cgroup;
mod mapping;
mod operator;
mod programs;
mod redis;
mod selection;
mod strangers;
mod streams;
mod unread_log;
mod web;
