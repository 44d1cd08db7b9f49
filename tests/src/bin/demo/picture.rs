//! The lab as a picture of characters.

use anyhow::Result;
use kproxy_lab::{Lab, Node};

/// How wide the part of one node is.
const WIDTH: usize = 29;

/// Nodes with their pods, the wire below them, and at its end the load balancer, which `elb` describes.
pub fn picture(lab: &Lab, elb: &str) -> Result<String> {
    let nodes: Vec<&Node> = lab.nodes().collect();
    let pods: Vec<Vec<String>> = nodes.iter().map(|node| pods_of(lab, node)).collect();
    let height = pods.iter().map(Vec::len).max().unwrap_or(0);

    let mut lines = vec![row(nodes.iter().map(|node| format!("{}  {}", node.name(), node.v4())))];
    for index in 0..height {
        lines.push(row(pods.iter().map(|pods| pods.get(index).cloned().unwrap_or_else(|| "│".to_owned()))));
    }
    let wire = format!("┴{}", "─".repeat(WIDTH - 1)).repeat(nodes.len());
    lines.push(format!("{}┐", wire.replacen('┴', "└", 1)));
    let text = format!("elb  {}  {elb} ┘", lab.elb()?.v4());
    // It ends below the wire's end, if it is not longer than the wire.
    lines.push(format!("{text:>width$}", width = WIDTH * nodes.len() + 1));
    Ok(lines.join("\n"))
}

fn pods_of(lab: &Lab, node: &Node) -> Vec<String> {
    let of_node = lab.pods().filter(|pod| pod.node_name() == node.name());
    of_node.map(|pod| format!("├─ {:<9} {}", pod.name(), pod.v4())).collect()
}

fn row(cells: impl Iterator<Item = String>) -> String {
    let text: String = cells.map(|cell| format!("{cell:<WIDTH$}")).collect();
    text.trim_end().to_owned()
}
