//! What stands before kproxy's programs on the interfaces that have them. A program or filter that is run first can end
//! the way of a packet (TC_ACT_OK, TCX_PASS), and kproxy's then never sees it.

use aya::programs::{SchedClassifier, TcAttachType};

use super::{Finding, Status, finding};
use crate::{
    devices,
    programs::{Hook, filters, is_packet_program},
};

/// Whether kproxy's programs are the first on each interface where they are.
pub fn packet_hooks() -> Finding {
    let check = "order of packet hooks";
    let devices = match devices::list_now() {
        Ok(devices) => devices,
        Err(error) => return finding(check, Status::Warning, format!("{error:#}")),
    };
    let mut before = Vec::new();
    let mut interfaces = 0;
    for (index, device) in devices {
        let mut has_own = false;
        for (hook, way) in [(Hook::Ingress, "ingress"), (Hook::Egress, "egress")] {
            // Links of TCX run before all filters.
            let mut order = by_links(&device.name, hook);
            order.extend(by_filters(index, hook));
            let Some(own) = order.iter().position(|(is_own, _)| *is_own) else { continue };
            has_own = true;
            before.extend(order[..own].iter().map(|(_, what)| format!("{} {way}: {what}", device.name)));
        }
        interfaces += usize::from(has_own);
    }
    if interfaces == 0 {
        return finding(check, Status::Ok, "kproxy is attached to no interface now");
    }
    if before.is_empty() {
        return finding(check, Status::Ok, format!("kproxy's are the first on {interfaces} interfaces"));
    }
    let detail = format!(
        "others are run before kproxy's, and a packet whose way they end (TC_ACT_OK, TCX_PASS) is not served: {}: let them \
         end with TC_ACT_UNSPEC (TCX_NEXT), or attach them behind (tc: a higher pref; TCX: after)",
        before.join("; ")
    );
    finding(check, Status::Warning, detail)
}

type Place = (bool, String);

fn by_links(device: &str, hook: Hook) -> Vec<Place> {
    let way = match hook {
        Hook::Ingress => TcAttachType::Ingress,
        Hook::Egress => TcAttachType::Egress,
    };
    let Ok((_, programs)) = SchedClassifier::query_tcx(device, way) else {
        return Vec::new();
    };
    let place = |program: aya::programs::ProgramInfo| {
        let name = program.name_as_str().unwrap_or("?");
        (is_packet_program(name), format!("the program {name} (id {}, TCX)", program.id()))
    };
    programs.into_iter().map(place).collect()
}

fn by_filters(index: u32, hook: Hook) -> Vec<Place> {
    let filters = filters::list(index, hook).unwrap_or_default();
    filters.into_iter().map(|filter| (filter.is_own(), filter.describe())).collect()
}
