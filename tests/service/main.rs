//! `tngd serve` under a service manager (sd_listen_fds(3), sd_notify(3)), and reloads by signal.

#[allow(dead_code)]
#[path = "../leaks/lab.rs"]
mod lab;
#[path = "../netns/mod.rs"]
mod netns;
#[allow(dead_code)]
#[path = "../leaks/table.rs"]
mod table;

mod listeners;
mod manager;
mod notify;
mod reload;
mod store;
