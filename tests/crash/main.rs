//! Every named step of the life cycle, killed there and failed there.
//!
//! What a kill leaves in the kernel only refuses; the next start of the name works, and its clean stop leaves
//! nothing. A step that fails is undone. Needs the cargo feature `failpoints`.

#[allow(dead_code)]
#[path = "../leaks/lab.rs"]
mod lab;
#[path = "../netns/mod.rs"]
mod netns;
#[allow(dead_code)]
#[path = "../leaks/table.rs"]
mod table;

mod reload;
mod scene;
mod start;
mod stop;
mod takeover;
