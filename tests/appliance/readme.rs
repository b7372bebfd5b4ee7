//! The README's chapter for operators, run as it stands.

use super::container::Container;
use super::pair::Pair;

const README: &str = include_str!("../../README.md");
/// The chapter, and what a line before a block of commands says of where they run.
const CHAPTER: &str = "\n## Use it\n";
const BOTH: &str = "On both hosts:";
const SERVICE: &str = "On the service's host";
const CLIENT: &str = "On the client's host:";
/// Where the operator stands: the tree, as far as the commands name it.
const TREE: &str = "/srv/tree";
const REPOSITORY: &str = "/srv/tng-repository/current";

/// The commands of the chapter that stand behind the line that begins with `place`.
fn commands(place: &str) -> String {
    let chapter = README.split_once(CHAPTER).expect("the README has the chapter").1;
    let chapter = chapter.split("\n## ").next().unwrap_or(chapter);
    let after = chapter.split_once(&format!("\n{place}")).unwrap_or_else(|| panic!("the README says \"{place}\"")).1;
    let block = after.split_once("\n```sh\n").expect("commands follow").1;
    let block = block.split_once("\n```").expect("the block ends").0;
    format!("cd {TREE}\n{block}")
}

/// `target/repo` of the operator's tree, at the address where this host sees the repository.
fn put_tree(host: &Container) {
    host.sh(&format!(
        "mkdir -p {TREE}/target/repo
        cp {REPOSITORY}/tng-archive-keyring.gpg {TREE}/target/repo/
        sed 's|^URIs: .*|URIs: file:{REPOSITORY}|' {REPOSITORY}/tng.sources > {TREE}/target/repo/tng.sources"
    ));
}

/// Installs by the chapter's commands.
pub fn install(host: &Container) {
    put_tree(host);
    host.sh(&format!("export DEBIAN_FRONTEND=noninteractive\n{}", commands(BOTH)));
    host.sh(&format!("rm -r {TREE}/target"));
}

/// The chapter's commands on both sides. Afterwards all is as before: the scenarios take the steps one by one.
pub fn follow(pair: &Pair) {
    pair.point(
        "the README's chapter for operators, command by command: the service answers through the tunnel",
        || {
            pair.server.sh(&commands(SERVICE));
            let said = pair.client.sh(&commands(CLIENT));
            assert!(said.contains("uri=/through-the-tunnel"), "{said}");
            assert!(!pair.wire.saw("through-the-tunnel"), "PLAINTEXT: the README's request was on the wire");
            for host in [&pair.server, &pair.client] {
                host.sh(&format!("rmdir {TREE}"));
            }
            for (host, name) in [(&pair.server, "egress"), (&pair.client, "ingress")] {
                host.sh(&format!(
                    "systemctl disable -q tng@{name}; systemctl stop tng@{name}.socket; rm /etc/tng/{name}.toml"
                ));
            }
            String::new()
        },
    );
}
