//! `kproxy flows`: live flows of the packet path, read from the maps alone, so that it works with the agent stopped.
//! Tables can hold a million entries: they are read, and printed, page by page.

use std::{
    cell::RefCell,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use kproxy_common::{Address, Conversation, Flow, FlowKey, FlowTable, Protocol, Role};
use serde::{Serialize, Serializer};

use super::{UsageError, is_broken_pipe, print};
use crate::{
    cli::{Common, FlowsArgs, OutputFormat},
    flows::{self, Progress, ROLES, belongs},
    maps::kernel::{Cursor, FlowMaps},
    plan::split_name,
};

/// How many entries are read, and at most printed, at once.
const PAGE: u32 = 4_096;

/// Prints the flows that the maps hold.
pub fn run(common: &Common, args: &FlowsArgs) -> Result<()> {
    let filter = Filter::parse(args)?;
    let maps = FlowMaps::open(&common.bpf_root)?;
    let now = flows::now().context("cannot tell the time since boot")?;
    let flows = Flows {
        maps: &maps,
        filter,
        now,
        tables: FlowTable::BOTH.into_iter().collect(),
        cursor: Cursor::default(),
    };
    let printed = match args.output {
        OutputFormat::Table => table(flows, false),
        OutputFormat::Wide => table(flows, true),
        OutputFormat::Json => json(flows),
        OutputFormat::Yaml => yaml(flows),
    };
    match printed {
        // As with `| head`: who reads has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        other => other,
    }
}

/// One flow.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    /// Of the Service; empty when the Service port is gone.
    namespace: String,
    name: String,
    port_name: String,
    protocol: &'static str,
    client: String,
    /// Empty where the node speaks to the backend past every frontend.
    frontend: String,
    backend: String,
    /// The address and port that the backend sees, where the client is masked.
    #[serde(skip_serializing_if = "Option::is_none")]
    mask: Option<String>,
    state: &'static str,
    /// Since the last packet, which is noted about once a second.
    idle_seconds: u64,
    /// `established`, also while it is not certain that it has ended; or `transient`: opening, answered
    /// or closed, the first to make room.
    table: &'static str,
    number: u32,
}

/// Reads the flows page by page.
struct Flows<'a> {
    maps: &'a FlowMaps,
    filter: Filter,
    now: u64,
    tables: std::collections::VecDeque<FlowTable>,
    cursor: Cursor,
}

impl Iterator for Flows<'_> {
    type Item = Result<Vec<Row>>;

    fn next(&mut self) -> Option<Self::Item> {
        let table = *self.tables.front()?;
        let page = self.page(table);
        if self.cursor.is_at_end() || page.is_err() {
            self.cursor = Cursor::default();
            self.tables.pop_front();
        }
        Some(page)
    }
}

impl Flows<'_> {
    fn page(&mut self, table: FlowTable) -> Result<Vec<Row>> {
        let entries = self.maps.page(table, &mut self.cursor, PAGE)?;
        let rows = entries.iter().map(|(key, flow)| self.row(table, key, flow));
        rows.filter_map(Result::transpose).collect()
    }

    /// The row of the flow that this entry stands for; of a flow's entries, only the most telling one does.
    fn row(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> Result<Option<Row>> {
        let mut whole = Conversation::EMPTY;
        whole.read_entry(key, flow);
        if !self.filter.admits_addresses(&whole) {
            return Ok(None);
        }
        let info = self.maps.info(flow.number, flow.service)?;
        let (service, port_name) = match info.as_ref().and_then(|info| split_name(info.name())) {
            Some((service, port)) => (Some(service), port.to_owned()),
            None => (None, String::new()),
        };
        let (namespace, name) = service.map_or_else(Default::default, |key| (key.namespace, key.name));
        if !self.filter.admits_service(&namespace, &name) {
            return Ok(None);
        }
        let mut progress = Progress::of(key, flow);
        for role in ROLES {
            if role == flow.role {
                continue;
            }
            let Some((_, other_key, other)) = self.maps.entry(&whole, role)? else { continue };
            if !belongs(&whole, &other_key, &other) {
                continue;
            }
            if rank(role) < rank(flow.role) {
                return Ok(None);
            }
            progress = progress.and(&other);
        }
        Ok(Some(Row {
            namespace,
            name,
            port_name,
            protocol: protocol_word(whole.protocol),
            client: socket(whole.client, whole.client_port),
            frontend: match whole.frontend_port {
                // Of the node, past every frontend.
                0 => String::new(),
                port => socket(whole.frontend, port),
            },
            backend: socket(whole.backend, whole.backend_port),
            mask: (whole.is_masked() && (whole.mask, whole.mask_port) != (whole.client, whole.client_port))
                .then(|| socket(whole.mask, whole.mask_port)),
            state: progress.word(),
            idle_seconds: progress.idle(self.now).as_secs(),
            table: table.word(),
            number: whole.number,
        }))
    }
}

fn rank(role: Role) -> usize {
    ROLES.iter().position(|other| *other == role).unwrap_or(ROLES.len())
}

fn socket(address: Address, port: u16) -> String {
    SocketAddr::new(address.into(), port).to_string()
}

fn protocol_word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

/// Which flows are printed.
struct Filter {
    service: Option<(String, String)>,
    client: Option<Endpoint>,
    backend: Option<Endpoint>,
}

/// An address, a prefix, or one address and port.
enum Endpoint {
    Prefix(IpNet),
    Socket(SocketAddr),
}

impl Filter {
    fn parse(args: &FlowsArgs) -> Result<Self, UsageError> {
        let service = args.service.as_deref().map(|text| match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok((namespace.to_owned(), name.to_owned()))
            }
            _ => Err(UsageError(format!("--service takes namespace/name, not {text:?}"))),
        });
        let endpoint = |flag: &str, text: &Option<String>| {
            text.as_deref().map(|text| Endpoint::parse(flag, text)).transpose()
        };
        Ok(Self {
            service: service.transpose()?,
            client: endpoint("--client", &args.client)?,
            backend: endpoint("--backend", &args.backend)?,
        })
    }

    fn admits_addresses(&self, whole: &Conversation) -> bool {
        let fits = |wanted: &Option<Endpoint>, address, port| {
            wanted.as_ref().is_none_or(|wanted| wanted.contains(address, port))
        };
        fits(&self.client, whole.client, whole.client_port)
            && fits(&self.backend, whole.backend, whole.backend_port)
    }

    fn admits_service(&self, namespace: &str, name: &str) -> bool {
        self.service.as_ref().is_none_or(|wanted| (wanted.0.as_str(), wanted.1.as_str()) == (namespace, name))
    }
}

impl Endpoint {
    fn parse(flag: &str, text: &str) -> Result<Self, UsageError> {
        if let Ok(socket) = text.parse() {
            return Ok(Self::Socket(socket));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Prefix(address.into()));
        }
        text.parse().map(Self::Prefix).map_err(|_| {
            UsageError(format!(
                "{flag} takes an address, an address and port, or a prefix, as 10.244.1.7, 10.244.1.7:53 or \
                 10.244.1.0/24; not {text:?}"
            ))
        })
    }

    fn contains(&self, address: Address, port: u16) -> bool {
        let address = IpAddr::from(address);
        match self {
            Self::Prefix(prefix) => prefix.contains(&address),
            Self::Socket(socket) => *socket == SocketAddr::new(address, port),
        }
    }
}

/// A header once, then a table for each page; columns only ever widen.
fn table(flows: Flows<'_>, wide: bool) -> Result<()> {
    let mut header = vec![
        "NAMESPACE",
        "NAME",
        "PROTOCOL",
        "CLIENT",
        "FRONTEND",
        "BACKEND",
        "MASK",
        "STATE",
        "IDLE",
        "TABLE",
    ];
    if wide {
        header.extend(["PORT", "NUMBER"]);
    }
    let mut columns = print::Columns::new(&header);
    let mut out = io::stdout().lock();
    let mut is_empty = true;
    for page in flows {
        let rows: Vec<Vec<String>> = page?.into_iter().map(|row| cells(row, wide)).collect();
        if rows.is_empty() {
            continue;
        }
        if std::mem::take(&mut is_empty) {
            columns.fit(&rows);
            out.write_all(columns.line(header.iter().copied()).as_bytes())?;
        }
        columns.fit(&rows);
        for row in &rows {
            out.write_all(columns.line(row.iter().map(String::as_str)).as_bytes())?;
        }
    }
    if is_empty {
        out.write_all(b"No flows.\n")?;
    }
    Ok(())
}

fn cells(row: Row, wide: bool) -> Vec<String> {
    let Row {
        namespace,
        name,
        port_name,
        protocol,
        client,
        frontend,
        backend,
        mask,
        state,
        idle_seconds,
        table,
        number,
    } = row;
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let mut cells = vec![
        or_dash(namespace),
        or_dash(name),
        protocol.to_owned(),
        client,
        or_dash(frontend),
        backend,
        or_dash(mask.unwrap_or_default()),
        state.to_owned(),
        format!("{idle_seconds}s"),
        table.to_owned(),
    ];
    if wide {
        cells.extend([or_dash(port_name), number.to_string()]);
    }
    cells
}

fn json(flows: Flows<'_>) -> Result<()> {
    let mut out = io::stdout().lock();
    let list = List::new(flows);
    let written = serde_json::to_writer_pretty(&mut out, &list).map_err(io::Error::from);
    list.read_error()?;
    written.context("cannot print JSON")?;
    writeln!(out)?;
    Ok(())
}

fn yaml(flows: Flows<'_>) -> Result<()> {
    let mut text = io::stdout().lock();
    let list = List::new(flows);
    let written = serde_saphyr::to_io_writer(&mut text, &list);
    list.read_error()?;
    written.context("cannot print YAML")?;
    Ok(())
}

/// `{"items": […]}`, read while it is written.
struct List<'a> {
    flows: RefCell<Option<Flows<'a>>>,
    error: RefCell<Option<anyhow::Error>>,
}

impl<'a> List<'a> {
    fn new(flows: Flows<'a>) -> Self {
        Self { flows: RefCell::new(Some(flows)), error: RefCell::default() }
    }

    /// What kept the list from being read to its end.
    fn read_error(&self) -> Result<()> {
        self.error.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn rows(&self) -> impl Iterator<Item = Row> + '_ {
        let pages = self.flows.borrow_mut().take().into_iter().flatten();
        pages
            .map_while(|page| match page {
                Ok(rows) => Some(rows),
                Err(error) => {
                    self.error.replace(Some(error));
                    None
                }
            })
            .flatten()
    }
}

impl Serialize for List<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct Items<'a, 'b>(&'a List<'b>);
        impl Serialize for Items<'_, '_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_seq(self.0.rows())
            }
        }
        serializer.collect_map([("items", Items(self))])
    }
}

#[cfg(test)]
mod tests {
    use kproxy_common::FlowState;

    use super::*;

    fn args(service: &str, client: &str, backend: &str) -> FlowsArgs {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        FlowsArgs {
            service: some(service),
            client: some(client),
            backend: some(backend),
            output: OutputFormat::Table,
        }
    }

    fn flow() -> Conversation {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        Conversation {
            client: address("192.0.2.7"),
            client_port: 40_000,
            backend: address("10.244.1.7"),
            backend_port: 53,
            state: FlowState::Established,
            ..Conversation::EMPTY
        }
    }

    #[test]
    fn addresses_ports_and_prefixes_filter() {
        for (client, backend, admitted) in [
            ("", "", true),
            ("192.0.2.7", "", true),
            ("192.0.2.8", "", false),
            ("192.0.2.0/24", "10.244.1.7:53", true),
            ("192.0.2.7:40001", "", false),
            ("", "10.244.1.7:54", false),
            ("::/0", "", false),
        ] {
            let filter = Filter::parse(&args("", client, backend)).unwrap();
            assert_eq!(filter.admits_addresses(&flow()), admitted, "{client} {backend}");
        }
    }

    #[test]
    fn a_service_is_named_in_full() {
        let filter = Filter::parse(&args("default/web", "", "")).unwrap();
        assert!(filter.admits_service("default", "web"));
        assert!(!filter.admits_service("default", "web-2"));
        for wrong in ["web", "/web", "default/"] {
            assert!(Filter::parse(&args(wrong, "", "")).is_err(), "{wrong}");
        }
        assert!(Filter::parse(&args("", "somewhere", "")).is_err());
    }
}
