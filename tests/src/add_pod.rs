//! Pods that come and go while a node runs, as a CNI makes and removes them.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};

use crate::cgroup;
use crate::member::{Member, Node, Pod};
use crate::netns::Netns;
use crate::process::Cmd;
use crate::wiring;

impl Node {
    /// Adds a pod, wired as the others; `index` is its number among the node's pods, from 0, of
    /// which the described ones have the first. It is gone when the returned value is dropped, or
    /// with [`Node::remove_pod`]. The lab does not know it by name.
    ///
    /// # Errors
    /// When name or number are taken, or the kernel refuses.
    pub fn add_pod(&self, name: &str, index: usize) -> Result<Pod> {
        let spec = self.spec();
        ensure!(index >= spec.pods.len(), "pod {index} of {} is there already", self.name());
        let addresses = spec.pod_addresses(index)?;
        let netns = Netns::create(name)?;
        netns.set_sysctls(&wiring::sysctls_everywhere())?;
        let group = self.cgroup_root().join(name);
        cgroup::create(&group)?;
        let folder = self.folder().with_file_name(name);
        std::fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let member = Member::new(netns, group, folder, addresses);

        batch(self, &wiring::pod_wire(spec, index, name))?;
        let settings = wiring::sysctls_of_pod_wire(spec, name);
        let settings: Vec<_> = settings.iter().map(|(key, value)| (key.as_str(), *value)).collect();
        self.netns().set_sysctls(&settings)?;
        batch(&member, &wiring::pod(spec, addresses.0, addresses.1))?;
        Ok(Pod { member, node: self.name().to_owned() })
    }

    /// Takes a pod's wire away, as a CNI does when the pod ends.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove_pod(&self, pod: Pod) -> Result<()> {
        self.ip_command(&format!("link del {}", wiring::veth_name(pod.name())))?;
        Ok(())
    }

    /// The number of an interface here, by its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn interface_index(&self, name: &str) -> Result<u32> {
        let text = self.ip_command(&format!("-o link show dev {name}"))?;
        let (index, _) = text.split_once(':').with_context(|| format!("ip printed {text:?}"))?;
        index.trim().parse().with_context(|| format!("ip printed {text:?}"))
    }

    /// The addresses by which processes of the node itself can be seen, link-local ones left out.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn own_addresses(&self) -> Result<Vec<IpAddr>> {
        let text = self.ip_command("-o address show scope global")?;
        text.lines()
            .map(|line| {
                let address = line.split_whitespace().nth(3).and_then(|word| word.split('/').next());
                address.and_then(|word| word.parse().ok()).with_context(|| format!("ip printed {line:?}"))
            })
            .collect()
    }
}

fn batch(member: &Member, text: &str) -> Result<()> {
    let command = Cmd::new("ip", member.netns(), None, member.folder())?;
    let output = command.args(["-batch", "-"]).input(text).run()?;
    ensure!(output.status.success(), "in {}: {output}\nof:\n{text}", member.name());
    Ok(())
}
