create table if not exists shop_order (id text primary key, total_cents integer not null);
create table if not exists shop_invoice (order_id text primary key, total_cents integer not null);
